// What a client may not see is, to it, not there: whatever it asks, the bytes are those of a server without it.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { Info, Option, OptionReply, TransmissionFlag } from '../../../src/nbd/constants.js';
import { type Client, parseAccessRule } from '../../../src/nbd/server/access.js';
import type { ExportEntry } from '../../../src/nbd/server/exports.js';
import { parseIp } from '../../../src/nbd/server/ip-range.js';
import { VisibleExports } from '../../../src/nbd/server/visible-exports.js';
import {
  Conversation,
  clientFlags,
  directory,
  entry,
  infoData,
  metaData,
  option,
  readGreeting,
  type TestEntry,
} from '../../support/handshake.js';

const HERE: Client = { origin: { kind: 'unix' }, identity: null };
const ELSEWHERE: Client = { origin: { kind: 'ip', address: parseIp('192.0.2.1')! }, identity: null };
const access = (...rules: string[]) => rules.map(parseAccessRule);

function seenBy(client: Client, ...entries: ExportEntry[]) {
  const denied: string[] = [];
  const exports = new VisibleExports({
    exports: directory(...entries),
    client,
    secure: client.identity !== null,
    denied: ({ name }) => denied.push(name),
  });
  return { exports, denied };
}

function begun(client: Client, ...entries: ExportEntry[]): Conversation {
  return Conversation.begun(seenBy(client, ...entries).exports);
}

function hidden(changes: Partial<ExportEntry> = {}): TestEntry {
  return entry('secret', { access: access('write:address=10.0.0.0/8'), description: 'psst', ...changes });
}

const QUESTIONS: Record<string, (name: string) => Buffer> = {
  LIST: () => option(Option.LIST),
  INFO: (name) => option(Option.INFO, infoData(name, Object.values(Info))),
  GO: (name) => option(Option.GO, infoData(name, Object.values(Info))),
  EXPORT_NAME: (name) => option(Option.EXPORT_NAME, Buffer.from(name)),
  LIST_META_CONTEXT: (name) => option(Option.LIST_META_CONTEXT, metaData(name, [])),
  SET_META_CONTEXT: (name) =>
    Buffer.concat([
      option(Option.STRUCTURED_REPLY),
      option(Option.SET_META_CONTEXT, metaData(name, ['base:allocation'])),
    ]),
};

describe('none', () => {
  for (const [what, question] of Object.entries(QUESTIONS))
    for (const beside of [[], ['disk'], ['disk', 'data']])
      for (const name of ['secret', '', 'disk', 'nothing'])
        test(`${what} of ${JSON.stringify(name)} with ${beside.length} others: as if it were not there`, () => {
          const with_ = hidden();
          const others = () => beside.map((other) => entry(other));
          const a = begun(ELSEWHERE, ...others(), with_);
          const b = begun(ELSEWHERE, ...others());
          const resultA = a.push(question(name));
          const resultB = b.push(question(name));
          assert.deepEqual(a.sent(), b.sent());
          assert.equal(resultA?.kind, resultB?.kind);
          if (resultA?.kind === 'end') assert.deepEqual(resultA, resultB);
          assert.equal(with_.opened.length, 0);
        });

  test('whom a rule fits sees it, and it is the default export of nobody who sees others', () => {
    const client: Client = { origin: { kind: 'ip', address: parseIp('10.1.2.3')! }, identity: null };
    const { exports } = seenBy(client, entry('disk'), hidden());
    assert.deepEqual(
      exports.list().map(({ name }) => name),
      ['disk', 'secret'],
    );
    assert.equal(exports.find(''), undefined);
    assert.equal(exports.find('secret')?.name, 'secret');
    assert.equal(seenBy(ELSEWHERE, entry('disk'), hidden()).exports.find('')?.name, 'disk');
  });

  test('the server is told who asked for it by name', () => {
    const { exports, denied } = seenBy(ELSEWHERE, entry('disk'), hidden());
    exports.list();
    exports.find('');
    exports.find('nothing');
    assert.deepEqual(denied, []);
    exports.find('secret');
    assert.deepEqual(denied, ['secret']);
  });
});

describe('read', () => {
  const readable = () => entry('disk', { access: access('write:unix', 'read') });

  test('INFO, GO and EXPORT_NAME say read-only, and so does the session', () => {
    const flagsOf = (client: Client, question: Buffer, at: number) => {
      const conversation = begun(client, readable());
      const result = conversation.push(question);
      return { flags: conversation.sent().readUInt16BE(at), result };
    };
    for (const [question, at] of [
      [option(Option.INFO, infoData('disk')), 20 + 2 + 8],
      [option(Option.GO, infoData('disk')), 20 + 2 + 8],
      [option(Option.EXPORT_NAME, Buffer.from('disk')), 8],
    ] as const) {
      const theirs = flagsOf(ELSEWHERE, question, at);
      const ours = flagsOf(HERE, question, at);
      const { READ_ONLY, SEND_TRIM, SEND_WRITE_ZEROES } = TransmissionFlag;
      assert.equal(theirs.flags & (READ_ONLY | SEND_TRIM | SEND_WRITE_ZEROES), READ_ONLY);
      assert.equal(ours.flags & (READ_ONLY | SEND_TRIM | SEND_WRITE_ZEROES), SEND_TRIM | SEND_WRITE_ZEROES);
      if (theirs.result === undefined) continue;
      assert.ok(theirs.result.kind === 'transmission' && ours.result?.kind === 'transmission');
      assert.deepEqual([theirs.result.entry.readOnly, ours.result.entry.readOnly], [true, false]);
      assert.equal(theirs.result.device.readOnly, false, 'the device is the same for all');
    }
  });

  test('contexts that were selected stay', () => {
    const conversation = begun(ELSEWHERE, readable());
    const result = conversation.push(
      option(Option.STRUCTURED_REPLY),
      option(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation'])),
      option(Option.GO, infoData('')),
    );
    assert.ok(result?.kind === 'transmission');
    assert.deepEqual(
      result.contexts.map(({ name }) => name),
      ['base:allocation'],
    );
  });

  test('what is read-only anyway stays so for writers', () => {
    const { exports } = seenBy(HERE, entry('disk', { readOnly: true, access: access('write') }));
    assert.equal(exports.find('disk')?.readOnly, true);
  });

  test('what can be opened read-only only is not opened for writers', () => {
    const disk = entry('disk', { access: access('write') });
    const open = () => entry('disk', { readOnly: true }).open();
    const conversation = begun(HERE, { ...disk, open });
    assert.deepEqual(
      conversation.ask(Option.GO, infoData('disk')).map(({ type }) => type),
      [OptionReply.ERR_UNKNOWN],
    );
  });
});

describe('a name and TLS', () => {
  const alice: Client = { ...ELSEWHERE, identity: { kind: 'psk', name: 'alice' } };
  const bob: Client = { ...ELSEWHERE, identity: { kind: 'psk', name: 'bob' } };
  const forAlice = (changes: Partial<ExportEntry> = {}) =>
    entry('disk', { access: access('none:address=10.0.0.66', 'write:psk=alice'), ...changes });
  const answer = (client: Client, disk: ExportEntry) => {
    const { exports } = seenBy(client, disk);
    const behindTls = client.identity === null ? {} : { behindTls: { noZeroes: true } };
    const conversation = new Conversation(exports, { tls: 'allowed', ...behindTls });
    if (client.identity === null) {
      readGreeting(conversation.sent());
      conversation.push(clientFlags());
    }
    return conversation.ask(Option.GO, infoData('disk')).at(-1)!.type;
  };

  test('who proved it sees the export, nobody else', () => {
    assert.equal(answer(alice, forAlice()), OptionReply.ACK);
    assert.equal(answer(bob, forAlice()), OptionReply.ERR_UNKNOWN);
    assert.equal(answer(ELSEWHERE, forAlice()), OptionReply.ERR_UNKNOWN);
  });

  test('one that is for TLS only says so to those whom TLS could help', () => {
    const near: Client = { origin: { kind: 'ip', address: parseIp('10.0.0.66')! }, identity: null };
    assert.equal(answer(ELSEWHERE, forAlice({ tlsOnly: true })), OptionReply.ERR_TLS_REQD);
    assert.equal(answer(near, forAlice({ tlsOnly: true })), OptionReply.ERR_UNKNOWN);
    assert.equal(answer(bob, forAlice({ tlsOnly: true })), OptionReply.ERR_UNKNOWN);
    assert.equal(answer(alice, forAlice({ tlsOnly: true })), OptionReply.ACK);
  });
});

describe('an export that has all the clients it may have', () => {
  const full = (name: string) => (name === 'disk' ? 'export "disk" is full' : undefined);
  const limited = (...entries: ExportEntry[]) =>
    Conversation.begun(directory(...entries), undefined, undefined, { refusal: ({ name }) => full(name) });

  test('GO is refused with the reason, INFO is not, and another one may be chosen', () => {
    const disk = entry('disk');
    const conversation = limited(disk, entry('data'));
    assert.equal(conversation.ask(Option.INFO, infoData('disk')).at(-1)!.type, OptionReply.ACK);
    const [refused, ...more] = conversation.ask(Option.GO, infoData('disk'));
    assert.deepEqual(more, []);
    assert.deepEqual(
      [refused!.type, refused!.data.toString()],
      [OptionReply.ERR_POLICY, 'export "disk" is full'],
    );
    assert.equal(disk.opened.length, 0);
    assert.equal(conversation.push(option(Option.GO, infoData('data')))?.kind, 'transmission');
  });

  test('EXPORT_NAME has no way to say so', () => {
    const disk = entry('disk');
    const result = limited(disk).push(option(Option.EXPORT_NAME, Buffer.from('disk')));
    assert.deepEqual(result, { kind: 'end', reason: 'connections-max', detail: 'export "disk" is full' });
    assert.equal(disk.opened.length, 0);
  });
});

test('LIST that is switched off: ERR_POLICY, and names may be used all the same', () => {
  const conversation = Conversation.begun(directory(entry('disk')), undefined, undefined, {
    listExports: false,
  });
  assert.deepEqual(
    conversation.ask(Option.LIST).map(({ type }) => type),
    [OptionReply.ERR_POLICY],
  );
  assert.deepEqual(
    conversation.ask(Option.LIST, Buffer.from('x')).map(({ type }) => type),
    [OptionReply.ERR_INVALID],
  );
  assert.equal(conversation.push(option(Option.GO, infoData('disk')))?.kind, 'transmission');
});

test('an image is opened by the GO of a client that may, by nothing else', () => {
  const disk = entry('disk', { access: access('read:unix') });
  for (const [what, question] of Object.entries(QUESTIONS)) {
    begun(ELSEWHERE, disk).push(question('disk'));
    assert.equal(disk.opened.length, 0, what);
    if (what !== 'GO' && what !== 'EXPORT_NAME') begun(HERE, disk).push(question('disk'));
    assert.equal(disk.opened.length, 0, what);
  }
  begun(HERE, disk).push(QUESTIONS.GO!('disk'));
  assert.equal(disk.opened.length, 1);
});
