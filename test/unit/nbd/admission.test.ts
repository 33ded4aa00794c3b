import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { Origin } from '../../../src/nbd/server/access.js';
import { Admission, type Counted } from '../../../src/nbd/server/admission.js';
import { parseIp } from '../../../src/nbd/server/ip-range.js';
import { entry } from '../../support/handshake.js';

class Fake implements Counted {
  stage: Counted['stage'] = 'handshake';
  exportName: string | undefined;
  readonly origin: Origin;

  constructor(from: string) {
    this.origin = from === 'unix' ? { kind: 'unix' } : { kind: 'ip', address: parseIp(from)! };
  }

  serve(name: string): this {
    this.stage = 'transmission';
    this.exportName = name;
    return this;
  }

  giveWay(): void {
    assert.equal(this.stage, 'handshake');
    this.stage = 'ending';
  }
}

function rig(limits: { handshakesMax?: number; connectionsMax?: number } = {}) {
  const admission = new Admission<Fake>({ handshakesMax: 4, connectionsMax: 3, ...limits });
  const come = (from: string): { came: Fake; pushedOut: Fake | undefined } => {
    const pushedOut = admission.makeRoom();
    const came = new Fake(from);
    admission.add(came);
    return { came, pushedOut };
  };
  return { admission, come };
}

describe('clients in the handshake', () => {
  test('nobody gives way while there is room', () => {
    const { come } = rig();
    for (let count = 0; count < 4; count++) assert.equal(come('10.0.0.1').pushedOut, undefined);
  });

  test('the longest of the address with most of them gives way', () => {
    const { come } = rig();
    const other = come('10.0.0.2').came;
    const first = come('10.0.0.1').came;
    const second = come('10.0.0.1').came;
    come('unix');
    assert.equal(come('10.0.0.1').pushedOut, first);
    assert.equal(come('10.0.0.3').pushedOut, second);
    assert.equal(other.stage, 'handshake');
  });

  test('whoever has one is not pushed out by somebody with many', () => {
    const { come } = rig({ handshakesMax: 16 });
    const few = ['10.0.0.2', '2001:db8:1::1', 'unix'].map((from) => come(from).came);
    for (let count = 0; count < 1000; count++) come('10.0.0.1');
    for (const client of few) assert.equal(client.stage, 'handshake');
  });

  test('a network of 64 bits of IPv6 counts as one address, IPv4 in its clothes as itself', () => {
    const { come } = rig();
    const first = come('2001:db8::1').came;
    come('2001:db8::2');
    come('::ffff:10.0.0.1');
    come('10.0.0.2');
    assert.equal(come('10.0.0.3').pushedOut, first);
  });

  test('those in transmission and those that end take no place', () => {
    const { come } = rig();
    for (let count = 0; count < 10; count++) come('10.0.0.1').came.serve('disk');
    for (let count = 0; count < 10; count++) come('10.0.0.1').came.stage = 'ending';
    for (let count = 0; count < 4; count++) assert.equal(come('10.0.0.1').pushedOut, undefined);
    assert.notEqual(come('10.0.0.1').pushedOut, undefined);
  });
});

describe('clients in transmission', () => {
  test('in all', () => {
    const { admission, come } = rig();
    const [first] = ['a', 'b', 'c'].map((name) => {
      assert.equal(admission.refusal(entry(name)), undefined);
      return come('unix').came.serve(name);
    });
    assert.match(admission.refusal(entry('d'))!, /the server has all 3 connections/);
    admission.remove(first!);
    assert.equal(admission.refusal(entry('d')), undefined);
    assert.equal(admission.inTransmission(), 2);
  });

  test('of an export', () => {
    const { admission, come } = rig({ connectionsMax: 100 });
    const two = entry('two', { connectionsMax: 2 });
    come('unix').came.serve('other');
    come('unix');
    const first = come('unix').came.serve('two');
    assert.equal(admission.refusal(two), undefined);
    come('unix').came.serve('two');
    assert.match(admission.refusal(two)!, /export "two" has all 2 connections/);
    assert.equal(admission.refusal(entry('other')), undefined);
    assert.equal(admission.inTransmission('two'), 2);
    first.stage = 'ending';
    assert.equal(admission.refusal(two), undefined);
  });
});
