/** What a client may make of what it was sent. */
import assert from 'node:assert/strict';
import { BlockferryError } from '../../src/errors.js';
import type { ExportInfo, Extent } from '../../src/nbd/client/client.js';
import { Conversation } from './conversation.js';
import type { Record } from './hostile.js';
import type { Done } from './script.js';
import type { Answer } from './transmission.js';

/** Reads a connection once more, when it is over. */
export function readAgain({ client, server }: Record): Conversation {
  const conversation = new Conversation({ lenient: true });
  conversation.sent(Buffer.concat(client));
  conversation.received(Buffer.concat(server));
  return conversation;
}

/** What it was told about the export was said. */
export function checkInfo(conversation: Conversation, info: ExportInfo): void {
  const { terms } = conversation;
  assert.ok(terms !== null, 'it connected to a server that let nobody in');
  assert.equal(BigInt(info.size), terms.size);
  assert.equal(info.flags, terms.flags);
  assert.equal(info.structured, terms.structured);
}

/** What it gives as good was sent, whole and as it is; what it gives as bad is an error of ours. */
export function checkScript(conversation: Conversation, all: readonly Done[]): void {
  assert.equal(
    conversation.clientBreach,
    null,
    `our client broke the protocol: ${conversation.clientBreach}`,
  );
  if (conversation.lost) return;
  const { transmission } = conversation;
  const answers = new Map<number, Answer>();
  for (const answer of transmission?.answers ?? []) answers.set(answer.request.index, answer);
  all
    .filter(({ asked }) => asked)
    .forEach((done, index) => {
      const { step, error, data, extents } = done;
      if (error !== null) {
        assert.ok(error instanceof BlockferryError, String(error));
        assert.doesNotMatch(error.message, /\n/);
        return;
      }
      const what = `${step.what} of ${step.length} at ${step.offset}`;
      const answer = answers.get(index);
      assert.ok(answer !== undefined, `no whole answer came to ${what}, which is given as good`);
      assert.equal(answer.errno, 0, `the server refused ${what}, which is given as good`);
      if (data !== null) assert.ok(data.equals(answer.data!), `other bytes were sent for ${what}`);
      if (extents !== null) assert.deepEqual(extents, extentsOf(answer, conversation.terms!.size));
    });
}

/** As the client tells them: equal neighbours in one, nothing behind the end of the export. */
function extentsOf({ request, status }: Answer, size: bigint): Extent[] {
  assert.equal(status.size, 1);
  const merged: { length: number; flags: number }[] = [];
  let left = size - request.offset;
  for (const [length, flags] of [...status.values()][0]!) {
    const shown = Number(length < left ? length : left);
    left -= length;
    const last = merged.at(-1);
    if (last?.flags === Number(flags)) last.length += shown;
    else merged.push({ length: shown, flags: Number(flags) });
  }
  return merged;
}
