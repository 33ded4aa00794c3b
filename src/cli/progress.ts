/** Progress as people read it. A volume is at 100 % when it is plain, and never before. */

import type { ServedVolume, VolumeView } from '../host/control/api.js';
import { formatLeft, formatRate, formatSize } from './units.js';

/** "99.9": the share of local blocks in per cent, rounded down, 100.0 only in a phase without a source. */
export function formatShare(volume: Pick<ServedVolume, 'phase' | 'presentBytes' | 'size'>): string {
  if (volume.phase === 'plain' || volume.phase === 'sealed' || volume.phase === 'retired') return '100.0';
  const share = volume.size === 0 ? 0 : volume.presentBytes / volume.size;
  return Math.min(99.9, Math.floor(share * 1000) / 10).toFixed(1);
}

/** One line: "disk: relocating 42.1 % of 8 GiB, 110 MiB/s, 41 s left, 1.2 MiB on demand". */
export function progressLine(volume: VolumeView): string {
  if (volume.phase === 'unavailable') return `${volume.name}: not served: ${volume.error}`;
  const parts = [
    `${volume.name}: ${volume.phase} ${formatShare(volume)} % of ${formatSize(volume.size)} local`,
  ];
  if (volume.phase === 'relocating' || volume.phase === 'standby') parts.push(...movement(volume));
  return parts.join(', ');
}

function movement(volume: ServedVolume): string[] {
  const parts: string[] = [];
  const { background, source, traffic } = volume;
  if (source !== null && source.state !== 'connected') {
    parts.push(`source ${source.state}${source.error === undefined ? '' : ` (${source.error})`}`);
  }
  if (background.state === 'running') {
    parts.push(formatRate(background.rateBytesPerSecond));
    if (background.etaSeconds !== null) parts.push(`${formatLeft(background.etaSeconds)} left`);
  } else {
    parts.push(`background ${background.state}`);
  }
  parts.push(`${formatSize(traffic.demandBytes)} on demand`);
  return parts;
}

/**
 * Shows a line that changes: in place on a terminal, elsewhere as a new line when it is another one and `intervalMs` has passed.
 */
export class LiveLine {
  private shownAt = Number.NEGATIVE_INFINITY;
  private open = false;
  private last: string | null = null;

  constructor(
    private readonly out: { write(text: string): unknown; isTTY?: boolean; columns?: number },
    private readonly intervalMs = 1000,
    private readonly now: () => number = () => performance.now(),
  ) {}

  show(line: string): void {
    if (this.out.isTTY) {
      const width = (this.out.columns ?? 80) - 1;
      this.out.write(`\r\u001b[2K${line.slice(0, width)}`);
      this.open = true;
      return;
    }
    if (line === this.last || this.now() - this.shownAt < this.intervalMs) return;
    this.print(line);
  }

  /** A line that stays. */
  print(line: string): void {
    this.out.write(this.open ? `\r\u001b[2K${line}\n` : `${line}\n`);
    this.open = false;
    this.shownAt = this.now();
    this.last = line;
  }

  /** Leaves the last line as it is. */
  end(): void {
    if (this.open) this.out.write('\n');
    this.open = false;
  }
}
