/** Which machine may have which disk, now. */

import { BlockferryError } from '../errors.js';
import type { MachineDefinition } from '../hypervisor/driver.js';
import { type MachineEntry, usesVolume } from './machine-entry.js';
import type { MachineProcesses } from './machine-processes.js';
import type { Volumes } from './volumes.js';

export class MachineDisks {
  /** Volumes that a machine is about to be started on, with its name. */
  private readonly reserved = new Map<string, string>();

  constructor(
    private readonly volumes: Volumes,
    private readonly entries: ReadonlyMap<string, MachineEntry>,
    private readonly processes: MachineProcesses,
  ) {}

  /** Does `act`, which starts a process, while no other machine has or gets one of the disks. */
  async reserve<Result>(
    definition: MachineDefinition,
    phases: readonly string[],
    verb: string,
    act: () => Promise<Result>,
  ): Promise<Result> {
    for (const [name, other] of this.entries) {
      const shared = definition.disks.find(({ volume }) => usesVolume(other.definition, volume));
      if (shared === undefined || name === definition.name || !(await this.processes.isUnmanaged(name)))
        continue;
      throw new BlockferryError(
        'exists',
        `volume "${shared.volume}" is in use by machine "${name}", which a process of an earlier daemon still runs: end it first`,
      );
    }
    for (const { volume } of definition.disks) {
      const other = this.reserved.get(volume);
      if (other === undefined) continue;
      throw new BlockferryError(
        'exists',
        `volume "${volume}" is in use by machine "${other}", which is being started`,
      );
    }
    for (const { volume } of definition.disks) this.reserved.set(volume, definition.name);
    try {
      await this.check(definition, phases, verb);
      return await act();
    } finally {
      for (const { volume } of definition.disks) this.reserved.delete(volume);
    }
  }

  /** Fails unless every disk is in one of `phases`, with no change under way, and no other machine has it. */
  async check(definition: MachineDefinition, phases: readonly string[], verb: string): Promise<void> {
    const now = await Promise.all(definition.disks.map(({ volume }) => this.volumes.quietPhase(volume)));
    for (const [index, { volume }] of definition.disks.entries()) {
      const phase = now[index];
      if (!phases.includes(phase)) {
        throw new BlockferryError(
          'phase',
          `machine "${definition.name}" cannot ${verb}: its volume "${volume}" is ${phase}`,
        );
      }
      for (const other of this.entries.values()) {
        if (
          other.machine &&
          other.definition.name !== definition.name &&
          usesVolume(other.definition, volume)
        ) {
          throw new BlockferryError(
            'exists',
            `volume "${volume}" is in use by machine "${other.definition.name}"`,
          );
        }
      }
    }
  }
}
