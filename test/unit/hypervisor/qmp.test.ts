import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { QmpClient, QmpCommandError } from '../../../src/hypervisor/qmp.js';
import { FakeQmp, type FakeQmpOptions } from '../../fakes/fake-qmp.js';

async function listen(
  t: TestContext,
  options: FakeQmpOptions = {},
): Promise<{ fake: FakeQmp; path: string }> {
  const folder = mkdtempSync(join(tmpdir(), 'bf-qmp-'));
  const path = join(folder, 'qmp');
  const fake = await FakeQmp.listen(path, options);
  t.after(async () => {
    await fake.close();
    rmSync(folder, { recursive: true });
  });
  return { fake, path };
}

async function pair(
  t: TestContext,
  options: FakeQmpOptions = {},
): Promise<{ fake: FakeQmp; client: QmpClient }> {
  const { fake, path } = await listen(t, options);
  const client = await QmpClient.connect(path);
  t.after(() => client.close());
  return { fake, client };
}

test('commands are answered by id, in any order', async (t) => {
  const { fake, client } = await pair(t, {
    handlers: { slow: () => 'silence', quick: ({ n }) => ({ return: n }) },
  });
  const slow = client.execute('slow', { a: 1 });
  assert.equal(await client.execute('quick', { n: 5 }), 5);
  assert.deepEqual(
    fake.commands.map((command) => command.execute),
    ['qmp_capabilities', 'slow', 'quick'],
  );
  fake.raw('{"return": "at last", "id": 2}\r\n');
  assert.equal(await slow, 'at last');
});

test('a refusal names the command, its class and its reason', async (t) => {
  const { client } = await pair(t);
  await assert.rejects(client.execute('no-such-thing'), (error: unknown) => {
    assert.ok(error instanceof QmpCommandError);
    assert.equal(error.code, 'hypervisor');
    assert.equal(error.qemuClass, 'CommandNotFound');
    assert.match(error.message, /refused no-such-thing: The command/);
    return true;
  });
  assert.equal(client.lastEvent, 0);
});

test('an answer after its deadline harms nobody', async (t) => {
  const { fake, client } = await pair(t, {
    handlers: { slow: () => 'silence', quick: () => ({ return: 1 }) },
  });
  await assert.rejects(client.execute('slow', {}, 20), { code: 'timeout' });
  fake.raw(
    '{"return": {}, "id": 2}\r\n{"return": {}, "id": "not ours"}\r\n{"error": {"class": "X", "desc": "no id"}}\r\n',
  );
  assert.equal(await client.execute('quick'), 1);
});

test('half lines, several lines at once, and characters cut in two', async (t) => {
  const { fake, client } = await pair(t);
  const seen: string[] = [];
  client.onEvent((event) => seen.push(`${event.name} ${String(event.data.text)}`));
  const bytes = Buffer.from(
    '{"event": "A", "data": {"text": "größer"}}\r\n\r\n{"event": "B"}\n{"event": "C", "data": 7}\r\n',
  );
  const last = client.waitFor((event) => event.name === 'C', { timeoutMs: 5_000 });
  for (const byte of bytes) fake.raw(Buffer.from([byte]));
  assert.equal((await last).number, 3);
  assert.deepEqual(seen, ['A größer', 'B undefined', 'C undefined']);
});

test('an event that came before its wait is found, and one before `after` is not', async (t) => {
  const { fake, client } = await pair(t, { handlers: { sync: () => ({ return: 0 }) } });
  fake.event('RESUME', { n: 1 });
  await client.execute('sync');
  const before = client.lastEvent;
  assert.equal(before, 1);
  assert.equal(
    (await client.waitFor((event) => event.name === 'RESUME', { timeoutMs: 1_000, after: 0 })).timestampMs,
    1_700_000_000_250,
  );
  await assert.rejects(
    client.waitFor((event) => event.name === 'RESUME', { timeoutMs: 20, after: before }),
    { code: 'timeout' },
  );
  fake.event('RESUME', { n: 2 });
  const next = await client.waitFor((event) => event.name === 'RESUME', { timeoutMs: 1_000, after: before });
  assert.equal(next.data.n, 2);
});

test('only the last events are remembered', async (t) => {
  const { fake, client } = await pair(t, { handlers: { sync: () => ({ return: 0 }) } });
  for (let n = 1; n <= 1_000; n++) fake.event('E', { n });
  await client.execute('sync');
  assert.equal(client.lastEvent, 1_000);
  const oldest = await client.waitFor(() => true, { timeoutMs: 1_000, after: 0 });
  assert.equal(oldest.data.n, 745);
});

for (const [what, bytes, reason] of [
  ['what is no JSON', 'HTTP/1.1 400 Bad Request\r\n', /no JSON/],
  ['what is no object', '[1, 2]\r\n', /not an object/],
  ['a line without end', Buffer.alloc(5 * 1024 * 1024, 0x20), /more than 4194304 bytes/],
] as const) {
  test(`${what} ends the connection and all who wait`, async (t) => {
    const { fake, client } = await pair(t, { handlers: { slow: () => 'silence' } });
    const waits = [client.execute('slow'), client.waitFor(() => true, { timeoutMs: 60_000 })];
    const settled = Promise.allSettled(waits);
    fake.raw(bytes);
    assert.match((await client.closed).message, reason);
    for (const result of await settled) assert.equal(result.status, 'rejected');
    await assert.rejects(client.execute('quick'), { code: 'hypervisor' });
    await assert.rejects(
      client.waitFor(() => true, { timeoutMs: 10 }),
      { code: 'hypervisor' },
    );
  });
}

test('unknown messages are passed over', async (t) => {
  const { fake, client } = await pair(t, { handlers: { sync: () => ({ return: 0 }) } });
  fake.raw('{"something": "new"}\r\n{"event": 5}\r\n{"event": "E", "data": null, "timestamp": 3}\r\n');
  assert.equal(await client.execute('sync'), 0);
  assert.equal(client.lastEvent, 1);
});

test('QEMU hangs up in the middle of a command', async (t) => {
  const { client } = await pair(t, { handlers: { quit: () => 'hang-up' } });
  const waiting = assert.rejects(
    client.waitFor(() => true, { timeoutMs: 60_000 }),
    { code: 'hypervisor' },
  );
  await assert.rejects(client.execute('quit'), {
    code: 'hypervisor',
    message: 'QEMU closed the QMP connection',
  });
  await waiting;
});

test('close rejects what is pending', async (t) => {
  const { client } = await pair(t, { handlers: { slow: () => 'silence' } });
  const pending = assert.rejects(client.execute('slow'), /was closed/);
  client.close();
  client.close();
  await pending;
});

test('connecting: nobody there, no greeting, another protocol, capabilities refused', async (t) => {
  await assert.rejects(QmpClient.connect('/nonexistent/qmp'), (error: unknown) => {
    assert.equal(((error as Error).cause as NodeJS.ErrnoException).code, 'ENOENT');
    return true;
  });
  const silent = await listen(t, { greeting: null });
  await assert.rejects(QmpClient.connect(silent.path, 50), { code: 'timeout' });
  const other = await listen(t, { greeting: 'NBDMAGICIHAVEOPT' });
  await assert.rejects(QmpClient.connect(other.path), /no JSON/);
  const refusing = await listen(t, {
    handlers: { qmp_capabilities: () => ({ error: { class: 'GenericError', desc: 'no' } }) },
  });
  await assert.rejects(QmpClient.connect(refusing.path), /refused qmp_capabilities: no/);
});
