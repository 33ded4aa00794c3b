/** What a daemon knows of one volume, and what it says of it. */

import type { UnavailableVolume, VolumeView } from './control/api.js';
import type { HeldVolume } from './held-volume.js';
import { allocatedBytes } from './images.js';
import type { OpenMode } from './open.js';
import type { ExportListener } from './parts.js';
import type { Phase } from './service.js';
import type { Occurrence } from './waiting.js';

export interface OpenEntry {
  kind: 'open';
  service: HeldVolume;
  mode: OpenMode;
  handoff: Occurrence;
}

export type VolumeEntry = OpenEntry | { kind: 'unavailable'; view: UnavailableVolume };

export function unavailable(
  name: string,
  image: string,
  retired: string | null,
  error: string,
): UnavailableVolume {
  return { name, phase: 'unavailable', retiredId: retired, image, error, home: null };
}

/** `quiet`: once no change of its phase is under way. */
export async function viewOf(
  entry: VolumeEntry,
  quiet: boolean,
  link: ExportListener | undefined,
): Promise<VolumeView> {
  if (entry.kind === 'unavailable') return entry.view;
  const { service } = entry;
  const { status } = await service.look(quiet);
  return {
    ...status,
    clients: status.clients + (link?.connections(service.name) ?? 0),
    image: service.image,
    linkUri: link?.addresses(service.name)[0] ?? null,
    allocatedBytes: allocatedBytes(service.image, service.size),
    home: null,
  };
}

/** Once no change of it is under way. */
export async function quietPhaseOf(
  entry: VolumeEntry | undefined,
): Promise<Phase | 'unavailable' | 'absent'> {
  if (!entry) return 'absent';
  if (entry.kind === 'open') return (await entry.service.look(true)).status.phase;
  return entry.view.retiredId === null ? 'unavailable' : 'retired';
}
