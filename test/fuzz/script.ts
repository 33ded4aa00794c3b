/** What our client does in recordings, and in front of servers that misbehave: every command, some in flight together. */
import type { Extent, NbdClient } from '../../src/nbd/client/client.js';

export interface Step {
  what: 'read' | 'write' | 'zero' | 'trim' | 'cache' | 'flush' | 'status';
  offset: number;
  length: number;
  /** Starts together with the next step. */
  together?: boolean;
}

const KIB = 1024;

export const SCRIPT: readonly Step[] = [
  { what: 'read', offset: 0, length: 4 * KIB, together: true },
  { what: 'read', offset: 60 * KIB, length: 4 * KIB, together: true },
  { what: 'status', offset: 0, length: 64 * KIB },
  { what: 'write', offset: 8 * KIB, length: 4 * KIB, together: true },
  { what: 'read', offset: 16 * KIB, length: 40 * KIB, together: true },
  { what: 'write', offset: 20 * KIB + 512, length: 512 },
  { what: 'flush', offset: 0, length: 0, together: true },
  { what: 'cache', offset: 0, length: 16 * KIB, together: true },
  { what: 'zero', offset: 32 * KIB, length: 8 * KIB },
  { what: 'trim', offset: 48 * KIB, length: 8 * KIB, together: true },
  { what: 'read', offset: 4 * KIB, length: 12 * KIB },
  { what: 'status', offset: 16 * KIB, length: 32 * KIB, together: true },
  { what: 'read', offset: 512, length: 512 },
];

/** A byte no disk of ours holds before: what the script writes at `offset`. */
export const writtenAt = (offset: number): number => 0xa0 + ((offset >> 9) & 0x1f);

export interface Done {
  step: Step;
  /** It reached the wire. */
  asked: boolean;
  error: unknown;
  data: Buffer | null;
  extents: Extent[] | null;
}

/** Runs it; failures of steps are part of the result. */
export async function runScript(client: NbdClient, steps: readonly Step[] = SCRIPT): Promise<Done[]> {
  const all: Promise<Done>[] = [];
  for (const step of steps) {
    all.push(run(client, step));
    if (step.together !== true) await Promise.all(all);
  }
  return Promise.all(all);
}

async function run(client: NbdClient, step: Step): Promise<Done> {
  const { what, offset, length } = step;
  const done: Done = { step, asked: true, error: null, data: null, extents: null };
  try {
    if (what === 'read') {
      // Surrounded by bytes that must stay as they are.
      const buffer = Buffer.alloc(length + 2 * GUARD, 0xee);
      try {
        await client.read(offset, length, buffer, GUARD);
      } finally {
        checkGuards(buffer);
      }
      done.data = buffer.subarray(GUARD, GUARD + length);
    } else if (what === 'write')
      await client.write(offset, Buffer.alloc(length, writtenAt(offset)), 0, length);
    else if (what === 'status') done.extents = await client.blockStatus('base:allocation', offset, length);
    else if (what === 'flush') await client.flush();
    else await client[what](offset, length);
  } catch (error) {
    if (error instanceof GuardError) throw error;
    done.error = error;
    const { code } = error as { code?: string };
    done.asked = code !== 'usage' && code !== 'bounds' && code !== 'read-only';
  }
  return done;
}

const GUARD = 64;

class GuardError extends Error {}

function checkGuards(buffer: Buffer): void {
  const guard = Buffer.alloc(GUARD, 0xee);
  if (!buffer.subarray(0, GUARD).equals(guard) || !buffer.subarray(buffer.length - GUARD).equals(guard))
    throw new GuardError('bytes outside the buffer of a READ were written');
}
