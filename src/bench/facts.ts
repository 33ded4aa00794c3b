/** The machine that was measured on. */

import { readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import type { MachineFacts } from './report.js';

export function machineFactsHere(): MachineFacts {
  const processors = cpus();
  return {
    cpu: processors[0]?.model ?? 'unknown',
    cores: processors.length,
    memoryBytes: totalmem(),
    kernel: release(),
    system: systemName(),
    node: process.versions.node,
  };
}

/** Source: os-release(5). */
function systemName(): string {
  try {
    return /^PRETTY_NAME="?([^"\n]*)"?$/m.exec(readFileSync('/etc/os-release', 'utf8'))?.[1] ?? 'Linux';
  } catch {
    return 'Linux';
  }
}
