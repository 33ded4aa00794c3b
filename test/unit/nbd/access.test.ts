import assert from 'node:assert/strict';
import type net from 'node:net';
import { Duplex } from 'node:stream';
import { describe, test } from 'node:test';
import {
  type Client,
  couldBeLetIn,
  type Grade,
  gradeOf,
  originOf,
  parseAccessRule,
  unprovable,
} from '../../../src/nbd/server/access.js';
import { parseIp } from '../../../src/nbd/server/ip-range.js';

/** `from` is an address or 'unix'; `who` is certificate=NAME or psk=NAME. */
function client(from: string, who?: string): Client {
  const origin =
    from === 'unix' ? ({ kind: 'unix' } as const) : ({ kind: 'ip', address: parseIp(from)! } as const);
  const [kind, name] = who?.split('=') ?? [];
  const identity = name === undefined ? null : ({ kind: kind === 'psk' ? 'psk' : 'x509', name } as const);
  return { origin, identity };
}

function grade(rules: string[], from: string, who?: string): Grade {
  return gradeOf(rules.map(parseAccessRule), client(from, who));
}

describe('grades', () => {
  test('without rules everybody may write', () => {
    assert.equal(gradeOf(undefined, client('192.0.2.1')), 'write');
  });

  test('whom no rule fits may do nothing', () => {
    assert.equal(gradeOf([], client('unix')), 'none');
    assert.equal(grade(['write:address=10.0.0.0/8'], '11.0.0.1'), 'none');
  });

  test('the first rule that fits counts, not the most generous', () => {
    const rules = ['none:address=10.0.0.66', 'write:address=10.0.0.0/8', 'read'];
    assert.equal(grade(rules, '10.0.0.66'), 'none');
    assert.equal(grade(rules, '10.0.0.67'), 'write');
    assert.equal(grade(rules, '192.0.2.1'), 'read');
    assert.equal(grade(rules, 'unix'), 'read');
    assert.equal(grade(['read', 'write:unix'], 'unix'), 'read');
  });

  test('unix is no address, and no address is unix', () => {
    assert.equal(grade(['write:unix'], 'unix'), 'write');
    assert.equal(grade(['write:unix'], '127.0.0.1'), 'none');
    assert.equal(grade(['write:address=0.0.0.0/0', 'write:address=::/0'], 'unix'), 'none');
  });

  test('IPv4 over IPv6', () => {
    assert.equal(grade(['read:address=10.0.0.0/8'], '::ffff:10.1.2.3'), 'read');
    assert.equal(grade(['read:address=::/0'], '::ffff:10.1.2.3'), 'none');
  });

  test('a name that is not proven fits nothing', () => {
    const rules = ['write:certificate=host-b', 'read:psk=alice'];
    assert.equal(grade(rules, 'unix'), 'none');
    assert.equal(grade(['write:certificate=*', 'write:psk=*'], 'unix'), 'none');
    assert.equal(grade(rules, 'unix', 'certificate=host-b'), 'write');
    assert.equal(grade(rules, 'unix', 'psk=alice'), 'read');
    assert.equal(grade(rules, 'unix', 'psk=host-b'), 'none', 'a key is no certificate');
    assert.equal(grade(rules, 'unix', 'certificate=alice'), 'none');
    assert.equal(grade(rules, 'unix', 'certificate=Host-B'), 'none', 'names are exact');
    assert.equal(grade(rules, 'unix', 'certificate=host-bb'), 'none');
  });

  test('a star is any proven name of its kind', () => {
    assert.equal(grade(['read:certificate=*'], 'unix', 'certificate=anybody'), 'read');
    assert.equal(grade(['read:certificate=*'], 'unix', 'psk=anybody'), 'none');
    assert.equal(grade(['read:psk=*'], 'unix', 'psk=*'), 'read');
  });

  test('all conditions of a rule must hold', () => {
    const rules = ['write:certificate=host-b,address=10.0.0.2'];
    assert.equal(grade(rules, '10.0.0.2', 'certificate=host-b'), 'write');
    assert.equal(grade(rules, '10.0.0.3', 'certificate=host-b'), 'none');
    assert.equal(grade(rules, '10.0.0.2'), 'none');
    assert.equal(grade(['write:unix,psk=alice'], 'unix', 'psk=alice'), 'write');
  });
});

test('whether TLS could help a client', () => {
  const could = (rules: string[], from: string) =>
    couldBeLetIn(rules.map(parseAccessRule), client(from).origin);
  assert.equal(couldBeLetIn(undefined, client('unix').origin), true);
  assert.equal(could([], 'unix'), false);
  assert.equal(could(['read:psk=alice'], 'unix'), true);
  assert.equal(could(['read:psk=alice,address=10.0.0.1'], '10.0.0.2'), false);
  assert.equal(could(['none:address=10.0.0.2', 'read:psk=alice'], '10.0.0.2'), false);
  assert.equal(could(['none:certificate=x', 'read:psk=alice'], '10.0.0.2'), true);
  assert.equal(could(['none:certificate=x'], '10.0.0.2'), false);
  assert.equal(could(['none:unix', 'read'], '10.0.0.2'), true);
});

describe('the words of a rule', () => {
  test('names may hold anything', () => {
    const name = (text: string) => parseAccessRule(text).identity?.name;
    assert.equal(name('read:certificate=Foo\\, Inc.'), 'Foo, Inc.');
    assert.equal(name('read:psk=a=b:c'), 'a=b:c');
    assert.equal(name('read:psk=a\\\\,unix'), 'a\\');
    assert.equal(name('read:psk=a\\b'), 'a\\b');
    assert.equal(name('read:certificate=Zoë 🚢,unix'), 'Zoë 🚢');
    assert.equal(name('read:certificate=two\nlines'), 'two\nlines');
    assert.equal(parseAccessRule('write').identity, null);
  });

  const refused: [text: string, why: RegExp][] = [
    ['', /write GRADE or GRADE:CONDITION/],
    ['rw', /GRADE is none, read or write/],
    ['Read', /GRADE is none, read or write/],
    ['read=unix', /write GRADE/],
    ['read:', /"" is no condition: write address=/],
    ['read:unix,', /"" is no condition/],
    ['read:unix=x', /"unix=x" is no condition/],
    ['read:address', /"address" is no condition/],
    ['read:cn=x', /"cn=x" is no condition/],
    ['read: unix', /" unix" is no condition/],
    ['read:toString=1', /is no condition/],
    ['read:address=10.0.0.1/8', /write 10\.0\.0\.0\/8/],
    ['read:address=host-b', /an IPv4 or IPv6 address is due/],
    ['read:unix,address=::1', /write a rule for each/],
    ['read:address=10.0.0.1,address=10.0.0.2', /write a rule for each/],
    ['read:psk=a,certificate=b', /proves one name/],
    ['read:psk=', /psk wants a name, or \* for any/],
  ];
  for (const [text, why] of refused)
    test(`refused: ${JSON.stringify(text)}`, () => {
      assert.throws(() => parseAccessRule(text), { code: 'usage', message: why });
    });

  test('a refusal is one line of bounded length', () => {
    assert.throws(
      () => parseAccessRule(`read:${'x\n'.repeat(5000)}`),
      ({ message }: Error) => message.length < 400 && !message.includes('\n'),
    );
  });
});

test('rules that wait for a name nobody can prove', () => {
  const [cert, key, open] = ['read:certificate=*', 'read:psk=a', 'read:unix'].map(parseAccessRule);
  assert.equal(unprovable([open!], undefined), undefined);
  assert.equal(unprovable([cert!], undefined), 'certificate');
  assert.equal(unprovable([open!, key!], undefined), 'psk');
  assert.equal(unprovable([cert!], { certificates: 'pki' }), 'certificate');
  assert.equal(unprovable([cert!], { certificates: 'pki', verifyPeer: true }), undefined);
  assert.equal(unprovable([key!], { certificates: 'pki', verifyPeer: true }), 'psk');
  assert.equal(unprovable([key!], { pskFile: 'keys' }), undefined);
});

describe('where a connection comes from', () => {
  /** What Node says of a socket, some of which is hard to have at the right moment. */
  const socket = (facts: { remoteAddress?: string; localAddress?: string }) => facts as unknown as net.Socket;

  test('TCP', () => {
    assert.deepEqual(originOf(socket({ remoteAddress: '10.0.0.1', localAddress: '10.0.0.2' })), {
      kind: 'ip',
      address: parseIp('10.0.0.1'),
    });
    assert.deepEqual(originOf(socket({ remoteAddress: 'fe80::1%eth0', localAddress: 'fe80::2%eth0' })), {
      kind: 'ip',
      address: parseIp('fe80::1'),
    });
  });

  test('a unix socket, and pipes', () => {
    assert.deepEqual(originOf(socket({})), { kind: 'unix' });
    assert.deepEqual(originOf(new Duplex()), { kind: 'unix' });
  });

  test('a client of TCP that is gone is nobody, not somebody on this machine', () => {
    assert.equal(originOf(socket({ localAddress: '10.0.0.2' })), undefined);
  });
});
