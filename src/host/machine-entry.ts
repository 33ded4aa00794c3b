/** What a daemon knows of one machine, and how a machine's process ends. */

import type { Machine, MachineDefinition, MachineExit } from '../hypervisor/driver.js';
import type { MachineRecord } from './record.js';
import { delay } from './waiting.js';

const WAIT_SLICE_MS = 250;

export interface MachineEntry {
  definition: MachineDefinition;
  machine: Machine | null;
  ran: boolean;
  departed: boolean;
  /** Source: the move that claimed it. Destination: the move it came with. */
  moveId: string | null;
  incomingUri: string | null;
  sent: boolean;
  error: string | null;
  /** What was recorded before the move that brought it, to go back to when that is discarded. */
  before: { record: MachineRecord | undefined; entry: MachineEntry | undefined } | null;
}

/**
 * Ends a machine's process. The guest is asked to power off first and has `graceMs`; then it is paused, which flushes its disks, and
 * ends as by a power cut.
 */
export async function end(machine: Machine, graceMs: number, hurry?: AbortSignal): Promise<void> {
  if (graceMs > 0) {
    const asked = await machine.powerdown().then(
      () => true,
      () => false,
    );
    const patience = new AbortController();
    const waiting = AbortSignal.any(hurry ? [hurry, patience.signal] : [patience.signal]);
    if (asked) await Promise.race([machine.exited, delay(graceMs, waiting).catch(() => undefined)]);
    patience.abort();
  }
  if ((await machine.status().catch(() => null))?.state === 'running')
    await machine.pause().catch(() => undefined);
  await machine.stop();
}

/**
 * Looks at a machine whenever something happens to it, until `look` is done, the time is over, the process is gone or the caller is.
 * Answers with what was seen last.
 */
export async function watchMachine<Value>(
  machine: Machine,
  timeoutMs: number,
  signal: AbortSignal,
  look: () => Promise<{ done: boolean; value: Value }>,
): Promise<Value> {
  const deadline = performance.now() + timeoutMs;
  let wake: () => void = () => undefined;
  const unsubscribe = machine.onEvent(() => wake());
  try {
    for (;;) {
      const changed = new Promise<void>((resolve) => {
        wake = resolve;
      });
      const { done, value } = await look();
      const leftMs = deadline - performance.now();
      if (done || leftMs <= 0 || signal.aborted) return value;
      // Every change has its event; the slice bounds the wait all the same.
      await Promise.race([changed, delay(Math.min(leftMs, WAIT_SLICE_MS)), machine.exited]);
    }
  } finally {
    unsubscribe();
  }
}

export function newEntry(definition: MachineDefinition): MachineEntry {
  return {
    definition,
    machine: null,
    ran: false,
    departed: false,
    moveId: null,
    incomingUri: null,
    sent: false,
    error: null,
    before: null,
  };
}

export function usesVolume(definition: MachineDefinition, volume: string): boolean {
  return definition.disks.some((disk) => disk.volume === volume);
}

/** As QEMU writes it in tcp:HOST:PORT. */
export function tcpHost(host: string): string {
  return host.includes(':') && !host.startsWith('[') ? `[${host}]` : host;
}

/** One line, null for an orderly end. */
export function describeExit(exit: MachineExit): string | null {
  if (exit.code === 0) return null;
  const how = exit.signal === null ? `exit code ${exit.code}` : `signal ${exit.signal}`;
  const words = exit.stderr.trim().split('\n').at(-1) ?? '';
  return `its process ended with ${how}${words === '' ? '' : `: ${words.slice(0, 500)}`}`;
}
