/** The option COMPRESSION in both handshakes, without sockets: when it may be asked, and what is left of what was agreed on before. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ClientHandshake } from '../../../../src/nbd/client/handshake.js';
import { encodeCompressionRequest } from '../../../../src/nbd/codec/frames.js';
import { OPTION_BYTES_MAX, Option, OptionReply } from '../../../../src/nbd/constants.js';
import { greeting, optionReply } from '../../../fakes/fake-server.js';
import { Conversation, directory, entry, metaData, option, readReplies } from '../../../support/handshake.js';

const { ACK, ERR_INVALID, ERR_TLS_REQD, ERR_UNSUP } = OptionReply;
const { COMPRESSION, EXTENDED_HEADERS, LIST, SET_META_CONTEXT, STARTTLS, STRUCTURED_REPLY } = Option;
const types = (replies: { type: number }[]) => replies.map(({ type }) => type);
const request = encodeCompressionRequest(3);

const begun = (more: object = {}, tls: 'off' | 'allowed' | 'required' = 'off') =>
  Conversation.begun(directory(entry('disk')), undefined, tls, { compression: true, ...more });

test('a server without it answers as to any unknown option', () => {
  for (const data of [request, Buffer.alloc(0), Buffer.alloc(OPTION_BYTES_MAX + 1)])
    assert.deepEqual(types(begun({ compression: false }).ask(COMPRESSION, data)), [ERR_UNSUP]);
});

test('it is acknowledged, and ends the handshake; what came behind it is kept as frames', () => {
  const conversation = begun();
  const result = conversation.push(option(COMPRESSION, request), Buffer.from('frames'));
  assert.deepEqual(types(readReplies(conversation.sent())), [ACK]);
  assert.equal(result?.kind, 'compression');
  assert.deepEqual(result, {
    kind: 'compression',
    level: 3,
    behindCompression: { noZeroes: true, secure: false },
    rest: Buffer.from('frames'),
  });
});

test('data of another length, of no known level, or too long is refused, and haggling goes on', () => {
  const conversation = begun();
  const wrong = [
    Buffer.alloc(0),
    request.subarray(1),
    Buffer.concat([request, request]),
    Buffer.from([0, 1, 0, 99]),
  ];
  for (const data of [...wrong, Buffer.alloc(OPTION_BYTES_MAX + 1)])
    assert.deepEqual(types(conversation.ask(COMPRESSION, data)), [ERR_INVALID]);
  assert.deepEqual(types(conversation.ask(COMPRESSION, Buffer.from([0, 9, 0, 1]))), [ERR_UNSUP]);
  assert.equal(conversation.ask(LIST).at(-1)!.type, ACK);
});

test('where TLS is required it comes behind TLS', () => {
  assert.deepEqual(types(begun({}, 'required').ask(COMPRESSION, request)), [ERR_TLS_REQD]);
  const behind = new Conversation(directory(entry('disk')), {
    tls: 'required',
    compression: true,
    behindTls: { noZeroes: true },
  });
  const result = behind.push(option(COMPRESSION, request));
  assert.ok(result?.kind === 'compression' && result.behindCompression.secure);
});

test('behind it nothing is agreed on, it cannot be had twice, and TLS does not begin any more', () => {
  const exports = directory(entry('disk'));
  const conversation = new Conversation(exports, {
    tls: 'allowed',
    compression: true,
    behindCompression: { noZeroes: true, secure: false },
  });
  assert.equal(conversation.sent().length, 0, 'no second greeting');
  assert.deepEqual(types(conversation.ask(SET_META_CONTEXT, metaData('disk', []))), [ERR_INVALID]);
  assert.deepEqual(types(conversation.ask(STARTTLS)), [ERR_INVALID]);
  assert.deepEqual(types(conversation.ask(COMPRESSION, request)), [ERR_INVALID]);
  assert.deepEqual(types(conversation.ask(STRUCTURED_REPLY)), [ACK]);
});

function asking(secure = false): ClientHandshake {
  const goal = { kind: 'connect', exportName: 'disk', contexts: [], requireStructured: false } as const;
  return new ClientHandshake({ ...goal, extended: true, compression: 3 }, secure);
}
/** The option of a client's message, behind its flags or not. */
const optionIn = (bytes: Buffer | null): number =>
  bytes!.readUInt32BE((bytes!.readUInt32BE(0) <= 3 ? 4 : 0) + 8);

test('the client asks first of all, and says nothing until frames are spoken', () => {
  const client = asking();
  assert.equal(optionIn(client.receive(greeting())), COMPRESSION);
  assert.equal(client.receive(optionReply(COMPRESSION, ACK)), null);
  assert.ok(client.startsCompression);
  assert.equal(client.farewell, null);
  assert.equal(optionIn(client.compressed()), EXTENDED_HEADERS);
});

test('a server that knows nothing of it is spoken to without', () => {
  for (const refusal of [ERR_UNSUP, ERR_INVALID, OptionReply.ERR_POLICY]) {
    const client = asking();
    client.receive(greeting());
    assert.equal(optionIn(client.receive(optionReply(COMPRESSION, refusal))), EXTENDED_HEADERS);
    assert.ok(!client.startsCompression);
  }
});

test('with TLS the client asks behind it', () => {
  const client = asking(true);
  assert.equal(optionIn(client.receive(greeting())), STARTTLS);
  client.receive(optionReply(STARTTLS, ACK));
  assert.equal(optionIn(client.secured()), COMPRESSION);
});

test('bytes behind the ACK that are no frames of an answer break the protocol', () => {
  const client = asking();
  client.receive(greeting());
  assert.throws(
    () => client.receive(Buffer.concat([optionReply(COMPRESSION, ACK), Buffer.from('x')])),
    /more than/,
  );
});
