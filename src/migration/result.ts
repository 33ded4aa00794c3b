/** What a finished move reports. */

import { BlockferryError } from '../errors.js';
import type { HostControl } from '../host/control/api.js';
import type { Journal } from './journal.js';

/** Times in milliseconds, sizes in bytes; null where it is not known, or not of this outcome. */
export interface MoveResult {
  id: string;
  vm: string;
  outcome: 'moved' | 'aborted';
  /** What the machine does at the end, where it then is; null if that could not be asked. */
  state: string | null;
  /** Why it was aborted. */
  why: string | null;
  /** As QEMU reports it: leaves out device load and page faults at the destination. */
  downtimeMs: number | null;
  ramBytes: number | null;
  ramMs: number | null;
  /** From the start of the move until the guest ran at the destination. */
  switchedMs: number | null;
  /** From then until the last block was local. */
  handoffMs: number | null;
  /** From the start of the move until the last block was local. */
  totalMs: number | null;
  demandBytes: number;
  backgroundBytes: number;
  zeroBytes: number;
  wireBytes: number;
}

export async function moveResult(
  journal: Journal,
  from: HostControl,
  to: HostControl,
  outcome: 'moved' | 'aborted',
  why: string | null,
): Promise<MoveResult> {
  const { plan } = journal;
  const ram = journal.result('ram');
  const arrivedAt = outcome === 'moved' ? journal.result('arrivedAt') : undefined;
  const handoffAt = outcome === 'moved' ? journal.result('handoffAt') : undefined;
  const between = (start: string | undefined, end: string | undefined): number | null =>
    start === undefined || end === undefined ? null : Date.parse(end) - Date.parse(start);
  return {
    id: plan.id,
    vm: plan.vm,
    outcome,
    state: await machineState(outcome === 'moved' ? to : from, plan.vm),
    why,
    downtimeMs: ram?.downtimeMs ?? null,
    ramBytes: ram?.transferredBytes ?? null,
    ramMs: ram?.totalMs ?? null,
    switchedMs: between(plan.createdAt, arrivedAt),
    handoffMs: between(arrivedAt, handoffAt ?? arrivedAt),
    totalMs: between(plan.createdAt, handoffAt ?? arrivedAt),
    ...(await traffic(journal, to, outcome)),
  };
}

async function machineState(host: HostControl, vm: string): Promise<string | null> {
  try {
    return (await host.machine(vm)).state;
  } catch (error) {
    if (error instanceof BlockferryError) return null;
    throw error;
  }
}

async function traffic(
  journal: Journal,
  to: HostControl,
  outcome: 'moved' | 'aborted',
): Promise<{ demandBytes: number; backgroundBytes: number; zeroBytes: number; wireBytes: number }> {
  const sum = { demandBytes: 0, backgroundBytes: 0, zeroBytes: 0, wireBytes: 0 };
  if (outcome === 'aborted') return sum;
  for (const { name } of journal.plan.volumes) {
    try {
      const view = await to.volume(name);
      if (view.phase === 'unavailable') continue;
      sum.demandBytes += view.traffic.demandBytes;
      sum.backgroundBytes += view.traffic.backgroundBytes;
      sum.zeroBytes += view.traffic.zeroBytes;
      sum.wireBytes += view.traffic.wireBytes;
    } catch (error) {
      // The move is complete whether or not its traffic can still be counted.
      if (!(error instanceof BlockferryError)) throw error;
    }
  }
  return sum;
}
