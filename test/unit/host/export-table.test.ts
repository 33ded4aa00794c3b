/** The exports of a listener, and what lies beside them under a name that is not told. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ExportTable } from '../../../src/host/parts.js';
import { parseAccessRule } from '../../../src/nbd/server/access.js';
import { VisibleExports } from '../../../src/nbd/server/visible-exports.js';
import { MemoryDevice } from '../../fakes/memory-device.js';

const disk = new MemoryDevice(1 << 20);
const hashes = new MemoryDevice(8192, { readOnly: true });

test('hashes are found by name, listed nowhere, and go with their volume', () => {
  const table = new ExportTable();
  let description = 'one';
  table.add('disk', () => description, disk, {}, hashes);
  assert.deepEqual(
    table.list().map(({ name }) => name),
    ['disk'],
  );
  assert.equal(table.find('')?.name, 'disk');
  description = 'two';
  const companion = table.find('disk/sha256');
  assert.deepEqual(
    [companion?.size, companion?.readOnly, companion?.description, companion?.open()],
    [8192, true, 'two', hashes],
  );
  assert.equal(table.find('/sha256'), undefined);
  assert.equal(table.find('disk/sha256/sha256'), undefined);
  table.add('disk', () => description, disk);
  assert.equal(table.find('disk/sha256'), undefined, 'those of the volume that was there before are gone');
  table.add('disk', () => description, disk, {}, hashes);
  table.remove('disk');
  assert.equal(table.find('disk/sha256'), undefined);
});

test('whom a volume is not for, its hashes are not for', () => {
  const table = new ExportTable();
  const policy = { tlsOnly: true, access: [parseAccessRule('read:address=10.0.0.0/24')], connectionsMax: 3 };
  table.add('disk', () => '', disk, policy, hashes);
  const companion = table.find('disk/sha256');
  assert.deepEqual(
    [companion?.tlsOnly, companion?.access, companion?.connectionsMax],
    [true, policy.access, 3],
  );
  const seen = (address: { bits: 32; value: bigint }, secure: boolean) =>
    new VisibleExports({
      exports: table,
      client: { origin: { kind: 'ip', address }, identity: null } as never,
      secure,
    }).find('disk/sha256');
  assert.notEqual(seen({ bits: 32, value: 0x0a000005n }, true), undefined);
  assert.equal(seen({ bits: 32, value: 0x0a000105n }, true), undefined);
});
