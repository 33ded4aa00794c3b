import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync } from 'node:fs';
import { describe, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { GuestDevice, LinkDevice } from '../../../src/volume/faces.js';
import { readIdentity } from '../../../src/volume/identity.js';
import { allows, hasMaps, PHASES, TRANSITIONS, type Transition } from '../../../src/volume/phase.js';
import type { Volume } from '../../../src/volume/volume.js';
import { failsWith, Io, patterned, turns } from '../../support/volume.js';
import { folderOf, host, SIZE, STATES, type State, sourceOf, volumeIn } from '../../support/volumes.js';

const B = 4096;

const CALLS: Record<Transition, (volume: Volume) => Promise<unknown>> = {
  seal: (volume) => volume.seal(volume.generation + 1),
  unseal: (volume) =>
    volume.unseal({
      volumeId: volume.id,
      generation: volume.identity.current.sealedFor ?? volume.generation + 1,
    }),
  retire: (volume) => volume.retire({ deleteImage: false }),
  takeover: (volume) => volume.takeover(volume.generation + 1),
  retreat: (volume) => volume.retreat(),
  handOff: (volume) => volume.handOff(),
};

/** What the table does not say: repetitions, and conditions beside the phase. */
const SPECIAL: Partial<Record<`${Transition} in ${State}`, 'refused' | 'unchanged' | 'false'>> = {
  'seal in sealed': 'unchanged',
  'retreat in standby': 'unchanged',
  'retreat in standby, alone': 'unchanged',
  'retreat in relocating, written': 'refused',
  'retire in retired': 'unchanged',
  'handOff in plain': 'unchanged',
  'handOff in relocating': 'false',
  'handOff in relocating, written': 'false',
};

describe('every transition in every phase', () => {
  for (const transition of Object.keys(TRANSITIONS) as Transition[]) {
    for (const state of STATES) {
      test(`${transition} in ${state}`, async () => {
        const root = host();
        const volume = await volumeIn(state, root);
        const { phase } = volume;
        const before = volume.identity.current;
        const onDisk = await readIdentity(folderOf(root));
        const expected =
          SPECIAL[`${transition} in ${state}`] ??
          (allows(phase, transition) ? 'done' : transition === 'handOff' ? 'false' : 'refused');
        const call = CALLS[transition](volume);
        if (expected === 'refused') await assert.rejects(call, failsWith('phase', /refused/));
        else if (expected === 'false') assert.equal(await call, false);
        else await call;
        if (expected === 'done') {
          assert.equal(volume.phase, TRANSITIONS[transition].to);
          assert.deepEqual(await readIdentity(folderOf(root)), volume.identity.current);
        } else {
          assert.deepEqual(volume.identity.current, before);
          assert.deepEqual(await readIdentity(folderOf(root)), onDisk);
        }
        assert.ok(volume.generation >= before.generation);
        await checkFaces(volume);
        await volume.close();
      });
    }
  }
});

/** The two devices answer as the phase says. */
async function checkFaces(volume: Volume): Promise<void> {
  const source = sourceOf(volume);
  const guest = new GuestDevice(volume);
  const link = new LinkDevice(volume);
  const { phase } = volume;
  const local = !hasMaps(phase);
  const buffer = Buffer.alloc(B);
  const hidden = phase === 'sealed' || phase === 'retired';
  assert.equal(guest.readNow(0, B, buffer, 0), hidden ? Errno.EPERM : local ? 0 : LATER);
  assert.equal(link.readNow(0, B, buffer, 0), local ? 0 : LATER);
  if (phase === 'standby') {
    const read = new Io(0, B);
    guest.read(read);
    assert.deepEqual(source.through, [read], 'read from the source, not kept');
    source.answerThrough();
    source.deliver(0, 2);
    assert.equal(volume.store.presence?.present, 0);
  }
  const refused = [Io.write(0, patterned(B)), new Io(0, B), new Io(0, B)];
  assert.equal(link.writeNow(), Errno.EPERM);
  link.write(refused[0]!);
  link.zero(refused[1]!);
  link.trim(refused[2]!);
  assert.deepEqual(
    refused.map((request) => request.errno),
    [Errno.EPERM, Errno.EPERM, Errno.EPERM],
  );
  const write = Io.write(B, patterned(B, 3));
  guest.write(write);
  const writable = phase === 'plain' || phase === 'relocating' || volume.identity.current.takesOverAtWrite;
  assert.equal(await write.done, writable ? Errno.OK : Errno.EPERM);
  if (!writable) return;
  const { phase: after, written } = volume.identity.current;
  assert.ok(after === 'plain' || (after === 'relocating' && written), 'durable before the write is answered');
}

describe('generations', () => {
  test('sealing: idempotent for its generation, never for an old one or while sealed for another', async () => {
    const volume = await volumeIn('plain');
    await volume.seal(5);
    await volume.seal(5);
    await assert.rejects(volume.seal(6), failsWith('phase', /for generation 5/));
    await volume.unseal({ volumeId: volume.id, generation: 5 });
    await volume.unseal({ volumeId: volume.id, generation: 5 });
    assert.equal(volume.generation, 5);
    for (const stale of [1, 4, 5]) await assert.rejects(volume.seal(stale), failsWith('generation', /stale/));
    await volume.seal(6);
  });

  test('unsealing needs a proof for this volume and its generation', async () => {
    const volume = await volumeIn('sealed');
    const other = { volumeId: randomUUID(), generation: 9 };
    await assert.rejects(volume.unseal(other), failsWith('generation', /proof is for volume/));
    const early = { volumeId: volume.id, generation: 1 };
    await assert.rejects(volume.unseal(early), failsWith('generation', /sealed for 2/));
    assert.equal(volume.phase, 'sealed');
    await volume.unseal({ volumeId: volume.id, generation: 7 });
    assert.deepEqual([volume.phase, volume.generation], ['plain', 7]);
  });

  test('taking over: idempotent for its generation; stale ones and second ones are refused', async () => {
    const volume = await volumeIn('standby');
    await assert.rejects(volume.takeover(4), failsWith('generation'));
    assert.deepEqual(await Promise.all([volume.takeover(), volume.takeover()]), [
      { generation: 5 },
      { generation: 5 },
    ]);
    assert.deepEqual(await volume.takeover(5), { generation: 5 });
    await assert.rejects(volume.takeover(6), failsWith('phase'));
    await assert.rejects(volume.takeover(4), failsWith('phase'));
  });

  test('a generation that was retreated from is burnt', async () => {
    const volume = await volumeIn('relocating');
    const proof = { volumeId: volume.id, generation: 5 };
    assert.deepEqual(await volume.retreat(), proof);
    assert.deepEqual(await volume.retreat(), proof);
    await assert.rejects(volume.takeover(5), failsWith('generation', /stale/));
    assert.deepEqual(await volume.takeover(), { generation: 6 });
  });

  test('a generation that is no whole number reaches no disk', async () => {
    const root = host();
    const volume = await volumeIn('standby', root);
    for (const wrong of [5.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 60])
      await assert.rejects(volume.takeover(wrong));
    assert.equal((await readIdentity(folderOf(root)))?.generation, 4);
    const plain = await volumeIn('plain');
    await assert.rejects(plain.seal(2.5));
    assert.equal(plain.phase, 'plain');
    assert.equal(plain.store.writeNow(0, 1, Buffer.alloc(1), 0), Errno.OK, 'and the gate is open again');
  });
});

describe('the first guest write', () => {
  test('a retreat that comes first refuses it, and it is not kept', async () => {
    const volume = await volumeIn('relocating');
    const retreat = volume.retreat();
    const write = Io.write(0, patterned(B));
    volume.store.write(write);
    await retreat;
    assert.equal(await write.done, Errno.EPERM);
    assert.equal(volume.store.presence?.present, 0);
  });

  test('a retreat that comes after it is refused, and it is kept', async () => {
    const volume = await volumeIn('relocating');
    const write = Io.write(0, patterned(B));
    volume.store.write(write);
    await assert.rejects(volume.retreat(), failsWith('phase', /written/));
    assert.equal(await write.done, Errno.OK);
    assert.equal(volume.phase, 'relocating');
  });

  test('trims and zeroes count as writes', async () => {
    for (const change of ['trim', 'zero'] as const) {
      const volume = await volumeIn('relocating');
      const request = new Io(0, B);
      volume.store[change](request);
      assert.equal(await request.done, Errno.OK);
      assert.ok(volume.settled);
    }
  });

  test('a standby on its own takes over at it, once, and reads that wait go on', async () => {
    const volume = await volumeIn('standby, alone');
    const writes = [0, 1, 2].map((block) => Io.write(block * B, patterned(B, block + 1)));
    for (const write of writes) volume.store.write(write);
    assert.deepEqual(await Promise.all(writes.map((write) => write.done)), [0, 0, 0]);
    assert.deepEqual([volume.phase, volume.generation, volume.settled], ['relocating', 2, true]);
  });
});

describe('retreat', () => {
  test('drops what was fetched, and what is fetched for an old takeover never comes back', async () => {
    const volume = await volumeIn('relocating');
    const source = sourceOf(volume);
    const { epoch } = volume.store;
    source.deliver(0, 4);
    const read = new Io(5 * B, B);
    volume.store.read(read);
    await volume.retreat();
    assert.deepEqual(source.through, [read], 'who waited reads through');
    await volume.takeover();
    source.deliver(0, 9, epoch);
    assert.equal(volume.store.presence?.present, 0);
    source.deliver(0, 1);
    assert.equal(volume.store.presence?.present, 1);
  });
});

describe('hand-off', () => {
  test('all here and settled: plain, without maps or source, while the devices stay', async () => {
    const root = host();
    const volume = await volumeIn('relocating', root);
    const source = sourceOf(volume);
    let complete = 0;
    volume.store.onComplete = () => complete++;
    source.deliver(0, 9);
    assert.equal(complete, 1);
    assert.equal(await volume.handOff(), false, 'not settled');
    const guest = new GuestDevice(volume);
    await volume.settle();
    assert.deepEqual(await Promise.all([volume.handOff(), volume.handOff()]), [true, true]);
    assert.equal(volume.phase, 'plain');
    assert.ok(
      !existsSync(`${folderOf(root)}/presence.map`) && !existsSync(`${folderOf(root)}/presence.live`),
    );
    const { source: from, openBootId, handoffAt } = volume.identity.current;
    assert.deepEqual([from, openBootId], [null, null]);
    assert.ok(handoffAt !== null);
    const read = Buffer.alloc(SIZE);
    assert.equal(guest.readNow(0, SIZE, read, 0), Errno.OK);
    assert.ok(read.equals(source.content));
    assert.equal(guest.writeNow(1, 5, patterned(5), 0), Errno.OK);
    assert.deepEqual(await volume.takeover(5), { generation: 5 }, 'repeated');
  });

  test('writes and flushes go on all the while', async () => {
    const volume = await volumeIn('relocating, written');
    const source = sourceOf(volume);
    source.deliver(0, 9);
    const content = Buffer.from(source.content);
    let over = false;
    const handed = volume.handOff().finally(() => {
      over = true;
    });
    const requests: Io[] = [];
    for (let i = 0; !over; i++) {
      const data = patterned(100, i + 1);
      const offset = (i * 7) % (SIZE - 100); // a slow disk makes for many rounds
      const write = Io.write(offset, data); // by a thread, if the disk is slow
      volume.store.write(write);
      data.copy(content, offset);
      const flush = new Io(0, 0);
      volume.store.flush(flush);
      requests.push(write, flush);
      await write.done; // of two at once nobody says which is first
      await turns(1);
    }
    await handed;
    for (const request of requests) assert.equal(await request.done, Errno.OK);
    const read = new Io(0, SIZE);
    volume.store.read(read);
    assert.equal(await read.done, 0);
    assert.ok(read.payload.equals(content));
  });
});

test('the phases of the table are phases, and each is left by some way but retired', () => {
  for (const { from, to } of Object.values(TRANSITIONS)) {
    assert.ok(PHASES.includes(from) && PHASES.includes(to));
    assert.notEqual(from, 'retired');
  }
});
