/** The plan of a move: everything that is decided before anything is changed, and the checks that allow it. */

import { randomBytes } from 'node:crypto';
import { z } from 'zod';
import { BlockferryError } from '../errors.js';
import type { HostControl, MachineView, ServedVolume, StatusView } from '../host/control/api.js';
import { machineDefinitionSchema } from '../hypervisor/driver.js';
import type { Compression } from '../nbd/codec/frames.js';

/** now: the machine moves at once; hot: when what it reads is there; all: when everything is. */
const switchSchema = z.enum(['now', 'hot', 'all']);
export type Switch = z.infer<typeof switchSchema>;

export const PRE_COPY_MS_MAX = 3_600_000;

export const planSchema = z.strictObject({
  id: z.string().regex(/^[A-Za-z0-9._-]{1,100}$/),
  vm: z.string(),
  /** Control addresses. */
  from: z.string(),
  to: z.string(),
  switch: switchSchema,
  /** How long blocks may be copied before the machine moves; it moves then, however much is left. */
  preCopyMsMax: z.number().int().positive().default(PRE_COPY_MS_MAX),
  /** Of the links; null: as the destination is set. */
  compression: z
    .union([z.literal('off'), z.literal('auto'), z.number()])
    .nullable()
    .default(null),
  bandwidthBytesPerSecond: z.number().int().positive().nullable(),
  deleteSourceImages: z.boolean(),
  createdAt: z.iso.datetime(),
  definition: machineDefinitionSchema,
  volumes: z.array(
    z.strictObject({
      name: z.string(),
      volumeId: z.string(),
      size: z.number().int().positive(),
      /** The source's, at the time of planning. */
      generation: z.number().int(),
      /** What the destination takes over as. */
      nextGeneration: z.number().int(),
      sourceUri: z.string(),
      /** The destination still has the image of this generation; null: it has none. */
      since: z.number().int().nullable().default(null),
    }),
  ),
});
export type MovePlan = z.infer<typeof planSchema>;

export interface MoveRequest {
  vm: string;
  switch: Switch;
  preCopyMsMax?: number;
  compression?: Compression | null;
  /** For RAM and for the background copy; null: no limit of ours. */
  bandwidthBytesPerSecond: number | null;
  deleteSourceImages: boolean;
}

/** Looks at both hosts and changes nothing. Fails with 'migration' when the move cannot be made, saying what is in its way. */
export async function makePlan(from: HostControl, to: HostControl, request: MoveRequest): Promise<MovePlan> {
  const [source, destination] = await Promise.all([from.status(), to.status()]);
  checkHosts(source, destination);
  const machine = checkMachine(source, destination, request.vm);
  const volumes = machine.definition.disks.map((disk) => checkVolume(source, destination, disk.volume));
  checkSpace(destination, volumes);
  const createdAt = new Date();
  return {
    id: moveId(request.vm, createdAt),
    vm: request.vm,
    from: from.address,
    to: to.address,
    switch: request.switch,
    preCopyMsMax: request.preCopyMsMax ?? PRE_COPY_MS_MAX,
    compression: request.compression ?? null,
    bandwidthBytesPerSecond: request.bandwidthBytesPerSecond,
    deleteSourceImages: request.deleteSourceImages,
    createdAt: createdAt.toISOString(),
    definition: machine.definition,
    volumes: volumes.map((volume) => ({
      name: volume.name,
      volumeId: volume.id,
      size: volume.size,
      generation: volume.generation,
      nextGeneration: volume.generation + 1,
      sourceUri: volume.linkUri,
      since: volume.since,
    })),
  };
}

function refuse(message: string): never {
  throw new BlockferryError('migration', message);
}

/** For people's eyes too: "vm1-20260102T030405Z-9f3c01d2". */
function moveId(vm: string, at: Date): string {
  const stamp = at.toISOString().replace(/[-:]|\.\d+/g, '');
  return `${vm.slice(0, 64)}-${stamp}-${randomBytes(4).toString('hex')}`;
}

function checkHosts(source: StatusView, destination: StatusView): void {
  const [here, there] = [source.daemon, destination.daemon];
  if (here.name === there.name && here.pid === there.pid && here.startedAt === there.startedAt) {
    refuse(`--from and --to are the same daemon ("${here.name}"): name the one the machine is to move to`);
  }
  const series = (version: string): string => version.split('.').slice(0, 2).join('.');
  if (series(here.version) !== series(there.version)) {
    refuse(
      `the daemons do not fit: "${here.name}" is ${here.version}, "${there.name}" is ${there.version}; upgrade one of them`,
    );
  }
  if (there.images === null)
    refuse(`"${there.name}" takes no volumes: the destination must be a \`blockferry host\``);
}

function checkMachine(source: StatusView, destination: StatusView, vm: string): MachineView {
  const machine = source.vms.find((entry) => entry.name === vm);
  if (!machine) {
    const known = source.vms.map((entry) => entry.name).join(', ');
    return refuse(`"${source.daemon.name}" has no machine "${vm}"${known === '' ? '' : `; it has ${known}`}`);
  }
  if (machine.state !== 'running') {
    refuse(`machine "${vm}" is ${machine.state} at "${source.daemon.name}", only a running one can be moved`);
  }
  if (machine.moveId !== null) {
    refuse(
      `machine "${vm}" is being moved by ${machine.moveId}: continue that with --resume or end it with --abort`,
    );
  }
  const twin = destination.vms.find((entry) => entry.name === vm);
  if (twin && twin.state !== 'departed') {
    refuse(`"${destination.daemon.name}" has a machine "${vm}" already (${twin.state})`);
  }
  return machine;
}

function checkVolume(
  source: StatusView,
  destination: StatusView,
  name: string,
): ServedVolume & { linkUri: string; since: number | null } {
  const volume = source.volumes.find((entry) => entry.name === name);
  if (!volume) return refuse(`"${source.daemon.name}" has no volume "${name}"`);
  if (volume.phase === 'unavailable') return refuse(`volume "${name}" is not served: ${volume.error}`);
  if (volume.phase === 'relocating') {
    refuse(
      `volume "${name}" is still on its way to "${source.daemon.name}": wait for its hand-off (blockferry watch ${name})`,
    );
  }
  if (volume.phase !== 'plain')
    refuse(`volume "${name}" is ${volume.phase} at "${source.daemon.name}", it must be plain`);
  const { linkUri } = volume;
  if (linkUri === null)
    return refuse(
      `"${source.daemon.name}" has no link address: configure one, so that others can read from it`,
    );
  const twin = destination.volumes.find((entry) => entry.name === name);
  const left = twin?.phase === 'retired' || (twin?.phase === 'unavailable' && twin.retiredId !== null);
  if (twin && !left) {
    refuse(`"${destination.daemon.name}" has a volume "${name}" already (${twin.phase})`);
  }
  // What is there is of use only if what changed here since is known.
  const home = twin?.home ?? null;
  const known = volume.tracking?.since ?? null;
  const same = twin?.phase === 'unavailable' ? twin.retiredId === volume.id : twin?.id === volume.id;
  return { ...volume, linkUri, since: same && home !== null && home === known ? home : null };
}

/** Images arrive sparse: what the source's images occupy must fit. */
function checkSpace(
  destination: StatusView,
  volumes: readonly (ServedVolume & { since: number | null })[],
): void {
  const images = destination.daemon.images;
  if (images === null) return;
  const coming = volumes.filter((volume) => volume.since === null);
  const needed = coming.reduce((sum, volume) => sum + volume.allocatedBytes, 0);
  if (needed > images.freeBytes) {
    const short = `${needed} bytes are needed, ${images.freeBytes} are free`;
    throw new BlockferryError(
      'no-space',
      `too little space in ${images.path} at "${destination.daemon.name}": ${short}`,
    );
  }
}
