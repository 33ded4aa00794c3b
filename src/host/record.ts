/**
 * What a daemon remembers beyond its configuration: STATE/daemons/NAME.json, replaced atomically and durably.
 *
 * Invariants
 * - A volume that arrived is listed before its state folder is made; one that is listed without a state folder never came to be.
 * - A machine is listed as departed before the daemon lets go of the process that ran it, so that no restart starts it again.
 * - The proof of a cancelled volume is kept from before it is cancelled, so that a coordinator, or this daemon, that was killed at that
 *   moment can ask or answer again. A volume with a proof never takes over; one that arrives anew has none any more.
 */

import { mkdirSync, readFileSync } from 'node:fs';
import { open, rename } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import { machineDefinitionSchema } from '../hypervisor/driver.js';
import { describeIssues } from './config.js';
import type { RetreatProof } from './service.js';

const PROOFS_KEPT = 1000;

const machineRecord = z.strictObject({
  /** incoming: not known to have run here yet; arrived: it did; departed: it moved away. */
  state: z.enum(['incoming', 'arrived', 'departed']),
  moveId: z.string(),
  definition: machineDefinitionSchema,
});
export type MachineRecord = z.infer<typeof machineRecord>;

const recordSchema = z.strictObject({
  format: z.literal(1),
  /** Image paths of the volumes that arrived, by name. */
  volumes: z.record(z.string(), z.string()),
  vms: z.record(z.string(), machineRecord),
  cancelled: z.array(z.strictObject({ volumeId: z.string(), generation: z.number() })),
});
type Content = z.infer<typeof recordSchema>;

export class DaemonRecord {
  private last: Promise<void> = Promise.resolve();

  private constructor(
    private readonly path: string,
    private readonly content: Content,
  ) {}

  /** Fails with 'state-damaged' when the file is there and cannot be trusted. */
  static open(stateDir: string, daemon: string): DaemonRecord {
    const path = join(stateDir, 'daemons', `${daemon}.json`);
    let text: string;
    try {
      text = readFileSync(path, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') {
        return new DaemonRecord(path, { format: 1, volumes: {}, vms: {}, cancelled: [] });
      }
      throw new BlockferryError('state-damaged', `cannot read ${path}: ${messageOf(error)}`, {
        cause: error,
      });
    }
    let raw: unknown;
    try {
      raw = JSON.parse(text);
    } catch (error) {
      throw new BlockferryError('state-damaged', `${path} is damaged (no JSON): restore it or move it away`, {
        cause: error,
      });
    }
    const result = recordSchema.safeParse(raw);
    if (!result.success) {
      const why = describeIssues(result.error, 'the file');
      throw new BlockferryError('state-damaged', `${path} is damaged (${why}): restore it or move it away`);
    }
    return new DaemonRecord(path, result.data);
  }

  volumes(): [name: string, image: string][] {
    return Object.entries(this.content.volumes);
  }

  machines(): [name: string, record: MachineRecord][] {
    return Object.entries(this.content.vms);
  }

  machine(name: string): MachineRecord | undefined {
    return Object.hasOwn(this.content.vms, name) ? this.content.vms[name] : undefined;
  }

  proof(volumeId: string): RetreatProof | undefined {
    return this.content.cancelled.findLast((proof) => proof.volumeId === volumeId);
  }

  /** The volume arrives: what was proved of an earlier stay of it does not hold for this one. */
  expectVolume(name: string, image: string, volumeId: string): Promise<void> {
    this.content.volumes[name] = image;
    this.dropProof(volumeId);
    return this.store();
  }

  forgetVolume(name: string): Promise<void> {
    delete this.content.volumes[name];
    return this.store();
  }

  setMachine(name: string, record: MachineRecord | null): Promise<void> {
    if (record === null) delete this.content.vms[name];
    else this.content.vms[name] = record;
    return this.store();
  }

  addProof(proof: RetreatProof): Promise<void> {
    this.dropProof(proof.volumeId);
    this.content.cancelled.push({ volumeId: proof.volumeId, generation: proof.generation });
    this.content.cancelled.splice(0, this.content.cancelled.length - PROOFS_KEPT);
    return this.store();
  }

  private dropProof(volumeId: string): void {
    this.content.cancelled = this.content.cancelled.filter((proof) => proof.volumeId !== volumeId);
  }

  /** Writes one after the other; each caller waits for a write that has its change in it. */
  private store(): Promise<void> {
    const step = this.last.then(() => this.write());
    this.last = step.catch(() => undefined);
    return step;
  }

  private async write(): Promise<void> {
    const text = `${JSON.stringify(this.content, null, 2)}\n`;
    const draft = `${this.path}.new`;
    try {
      mkdirSync(dirname(this.path), { recursive: true, mode: 0o700 });
      const file = await open(draft, 'w', 0o600);
      try {
        await file.writeFile(text);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(draft, this.path);
      const folder = await open(dirname(this.path), 'r');
      try {
        await folder.sync();
      } finally {
        await folder.close();
      }
    } catch (error) {
      throw new BlockferryError('image-io', `cannot write ${this.path}: ${messageOf(error)}`, {
        cause: error,
      });
    }
  }
}
