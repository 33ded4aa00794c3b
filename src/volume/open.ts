/** The ways to get hold of a volume: as a plain image, new with a source, or from what an earlier process left. */
import { createHash, randomUUID } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, realpathSync, rmSync, statSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { BlockferryError } from '../errors.js';
import { blocksOf, VOLUME_BYTES_MAX } from './blocks.js';
import { bootId } from './boot.js';
import { DirtyMap } from './dirty.js';
import { makeFolder, removeFile, syncFolder } from './files.js';
import { FirstAccessFile } from './first-access-file.js';
import { HeatFile } from './heat-file.js';
import { IDENTITY_FILE, type Identity, IdentityFile, readIdentity } from './identity.js';
import { Image } from './image.js';
import { hasMaps } from './phase.js';
import { Presence } from './presence.js';
import { Volume } from './volume.js';

const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;

export function checkName(name: string): void {
  if (NAME.test(name)) return;
  throw new BlockferryError(
    'usage',
    `${JSON.stringify(name)} cannot be a volume's name: use letters, digits, '.', '_' and '-' (128 at most, not starting with '.' or '-')`,
  );
}

/** The name a volume gets when none is given. */
export function defaultName(imagePath: string): string {
  const name = basename(imagePath)
    .replace(/[^A-Za-z0-9._-]/g, '_')
    .replace(/^[.-]+/, '_')
    .slice(0, 128);
  return name === '' ? 'disk' : name;
}

/**
 * The id of an image nothing was stored about: the same whenever this machine serves this very file again, so that a source whose
 * daemon was started anew is still the disk its links know. A file that took its place has another one. RFC 9562, version 8.
 */
function idOfImage(image: Image): string {
  const { ino, birthtimeNs } = statSync(image.path, { bigint: true });
  const file = image.blockDevice ? [] : [ino, birthtimeNs];
  const digest = createHash('sha256')
    .update(['blockferry', machineId(), image.path, ...file].join('\0'))
    .digest();
  digest[6] = (digest[6]! & 0x0f) | 0x80;
  digest[8] = (digest[8]! & 0x3f) | 0x80;
  const hex = digest.toString('hex');
  const cuts = [0, 8, 12, 16, 20, 32];
  return cuts
    .slice(1)
    .map((end, index) => hex.slice(cuts[index], end))
    .join('-');
}

/** Source: machine-id(5). Without one, only this machine's paths tell volumes apart. */
function machineId(): string {
  try {
    return readFileSync('/etc/machine-id', 'latin1').trim();
  } catch {
    return '';
  }
}

function freshIdentity(name: string, image: Image, id: string): Identity {
  return {
    format: 1,
    id,
    name,
    image: image.path,
    size: image.size,
    phase: 'plain',
    generation: 1,
    mapEpoch: 1,
    sealedFor: null,
    written: true,
    source: null,
    takesOverAtWrite: false,
    preCopy: null,
    imageStamp: null,
    imageCreated: false,
    openBootId: null,
    created: new Date().toISOString(),
    handoffAt: null,
  };
}

/** Refuses an image that another volume of this state folder is made of: served under two names, it would be two disks. */
async function refuseForeignImage(stateDir: string, name: string, imagePath: string): Promise<void> {
  if (!existsSync(stateDir) || !existsSync(imagePath)) return;
  const path = realpathSync(imagePath);
  for (const entry of readdirSync(stateDir, { withFileTypes: true })) {
    if (!entry.isDirectory() || entry.name === name) continue;
    const other = await readIdentity(join(stateDir, entry.name)).catch(() => undefined);
    if (other?.image !== path) continue;
    throw new BlockferryError(
      'state-mismatch',
      `${path} is the image of volume ${other.name} (${other.phase}): use that name, or remove ${join(stateDir, entry.name)} first`,
    );
  }
}

function checkSize(size: number): void {
  if (size > 0 && size <= VOLUME_BYTES_MAX) return;
  throw new BlockferryError(
    'bounds',
    `a volume of ${size} bytes is not possible: 1 to ${VOLUME_BYTES_MAX} bytes are`,
  );
}

/** Serves an image as it is. What an earlier process left under that name is resumed, whatever its phase. */
export async function openPlain(options: {
  stateDir: string;
  name: string;
  image: string;
  readOnly?: boolean;
}): Promise<Volume> {
  const { stateDir, name, image: path, readOnly = false } = options;
  checkName(name);
  await refuseForeignImage(stateDir, name, path);
  const folder = join(stateDir, name);
  const known = await volumeIn(folder);
  if (known !== undefined) return reopenKnown(folder, known, { image: path, readOnly });
  const image = Image.open(path, { readOnly });
  try {
    await refuseStale(folder, known);
    refuseOrphanedMaps(folder, image.path);
    checkSize(image.size);
    return new Volume(
      new IdentityFile(folder, freshIdentity(name, image, idOfImage(image)), { stored: false }),
      image,
      null,
    );
  } catch (error) {
    image.close();
    throw error;
  }
}

export interface ProxiedOptions {
  stateDir: string;
  name: string;
  image: string;
  /** Bytes; the source's. */
  size: number;
  source: { uri: string; description: string | null };
  /** Standby until a takeover; else the volume is taken over at once. */
  standby: boolean;
  /** A coordinator drives the move: it brings the volume's identity, and only it takes over. */
  arrival: { volumeId: string; generation: number } | null;
  /** See Identity. */
  preCopy?: Identity['preCopy'];
  /** The image is this volume's of an earlier stay, and all that the source did not change since is in it, while its stamp is still this one. */
  homeStamp?: string | null;
}

/** A new volume whose blocks are all at its source. The image is created sparse; a block device is used as it is. */
export async function createProxied(options: ProxiedOptions): Promise<Volume> {
  const { stateDir, name, arrival, preCopy = null, homeStamp = null } = options;
  checkName(name);
  checkSize(options.size);
  await refuseForeignImage(stateDir, name, options.image);
  const folder = join(stateDir, name);
  if ((await volumeIn(folder)) !== undefined) {
    throw new BlockferryError(
      'exists',
      `there is a volume ${name} in ${stateDir} already: choose another name`,
    );
  }
  const { image, created } =
    homeStamp !== null && preCopy !== null
      ? { image: imageAtHome(options.image, homeStamp), created: false }
      : await imageFor(options.image, options.size);
  if (image.blockDevice) {
    // A file that holds data was refused already; what a device holds cannot be told.
    try {
      refuseOrphanedMaps(folder, image.path);
    } catch (error) {
      image.close();
      throw error;
    }
  }
  let presence: Presence | undefined;
  try {
    const identity: Identity = {
      ...freshIdentity(name, image, arrival?.volumeId ?? randomUUID()),
      ...(arrival === null ? {} : { generation: arrival.generation }),
      phase: options.standby ? 'standby' : 'relocating',
      written: !options.standby,
      source: options.source,
      takesOverAtWrite: options.standby && arrival === null,
      preCopy,
      imageCreated: created,
      openBootId: bootId(),
    };
    await makeFolder(folder);
    presence = await Presence.create(folder, identity, blocksOf(image.size));
    if (homeStamp !== null) presence.set(0, presence.blocks);
    const file = new IdentityFile(folder, identity, { stored: false });
    await file.update({});
    return new Volume(file, image, presence);
  } catch (error) {
    presence?.remove();
    image.close();
    if (created) rmSync(options.image, { force: true });
    throw error;
  }
}

/** Locked first, then looked at: nobody changes it any more. The stamp tells its size as well. */
function imageAtHome(path: string, stamp: string): Image {
  const image = Image.open(path);
  if (image.stamp === stamp) return image;
  image.close();
  throw new BlockferryError('state-mismatch', `somebody changed ${path} since the volume left it here`);
}

async function imageFor(path: string, size: number): Promise<{ image: Image; created: boolean }> {
  if (!existsSync(path)) {
    await makeFolder(resolve(path, '..'), 0o777);
    return { image: await Image.create(path, size), created: true };
  }
  const image = Image.open(path);
  const empty = image.blockDevice || image.isHole(0, image.size);
  if (empty && image.size === size) return { image, created: false };
  image.close();
  if (!empty) {
    throw new BlockferryError(
      'exists',
      `${path} holds data and is no volume of ours: it would be overwritten; remove it or choose another image`,
    );
  }
  throw new BlockferryError(
    'source-mismatch',
    `${path} has ${image.size} bytes, the source has ${size}: give an image of the same size`,
  );
}

/** Resumes what an earlier process left under a name. Throws 'not-found' where there is nothing. */
export async function reopen(options: { stateDir: string; name: string; image?: string }): Promise<Volume> {
  checkName(options.name);
  const folder = join(options.stateDir, options.name);
  const known = await volumeIn(folder);
  if (known === undefined)
    throw new BlockferryError('not-found', `there is no volume ${options.name} in ${options.stateDir}`);
  return reopenKnown(folder, known, {
    ...(options.image === undefined ? {} : { image: options.image }),
    readOnly: false,
  });
}

/** The identity was read before the image was locked: another process may have changed and closed the volume in between. */
async function refuseStale(folder: string, known: Identity | undefined): Promise<void> {
  if (isDeepStrictEqual(await readIdentity(folder), known)) return;
  throw new BlockferryError('image-in-use', `another process had the volume of ${folder} open: try again`);
}

/** A standby without maps: `cancel` deletes them first, and died before it had deleted the rest. Does that now. */
async function finishCancel(folder: string, known: Identity): Promise<boolean> {
  if (known.phase !== 'standby' || Presence.hasFiles(folder)) return false;
  if (known.imageCreated && existsSync(known.image)) {
    const image = Image.open(known.image);
    rmSync(known.image);
    image.close();
  }
  HeatFile.removeFiles(folder);
  FirstAccessFile.removeFiles(folder);
  await removeFile(join(folder, IDENTITY_FILE));
  return true;
}

/**
 * Maps say that an image is not complete, or was written to, and nobody knows of which volume: served as it is, or filled anew,
 * it would be a wrong disk. A creation that died leaves such maps as well, with an image that is empty: that may be made again.
 */
function refuseOrphanedMaps(folder: string, imagePath: string): void {
  if (!Presence.hasFiles(folder)) return;
  throw new BlockferryError(
    'state-damaged',
    `${folder} has presence maps and no ${IDENTITY_FILE}, so ${imagePath} may be incomplete and is not opened: ` +
      `restore ${IDENTITY_FILE} from a copy, or remove the folder if the image is known to be good or worthless`,
  );
}

/** The volume of a folder; undefined where there is none (any more). */
async function volumeIn(folder: string): Promise<Identity | undefined> {
  const known = await readIdentity(folder);
  return known !== undefined && (await finishCancel(folder, known)) ? undefined : known;
}

async function reopenKnown(
  folder: string,
  known: Identity,
  options: { image?: string; readOnly: boolean },
): Promise<Volume> {
  const { image: path, readOnly } = options;
  if (path !== undefined && !existsSync(path) && existsSync(known.image)) {
    throw new BlockferryError(
      'image-missing',
      `there is no image ${path}; volume ${known.name} has the image ${known.image}: give that, or another --name`,
    );
  }
  if (path !== undefined && existsSync(path) && realpathSync(path) !== known.image) {
    throw new BlockferryError(
      'state-mismatch',
      `volume ${known.name} has the image ${known.image}, not ${path}: use another --name, or remove ${folder} if it is obsolete`,
    );
  }
  if (known.phase === 'retired') {
    throw new BlockferryError(
      'phase',
      `volume ${known.name} was moved to another host and is retired; its image is stale: remove ${folder} to use it all the same`,
    );
  }
  const image = Image.open(known.image, { readOnly: readOnly && !hasMaps(known.phase) });
  let presence: Presence | null = null;
  let dirty: DirtyMap | null = null;
  try {
    await refuseStale(folder, known);
    // A process that was killed may have left a change there that is not durable yet, and all that follows relies on it.
    await syncFolder(folder);
    if (image.size !== known.size) {
      throw new BlockferryError(
        'state-mismatch',
        `image ${known.image} has ${image.size} bytes, volume ${known.name} has ${known.size}: restore the image, or remove ${folder}`,
      );
    }
    const file = new IdentityFile(folder, known, { stored: true });
    // What it kept may be stale, and the source tells only what changed since: that is known in the live map alone. Durable before a live map is made.
    if (known.phase === 'standby' && !Presence.isLive(folder, known, blocksOf(image.size)))
      await file.update({ mapEpoch: known.mapEpoch + 1 });
    if (hasMaps(known.phase)) presence = await Presence.recover(folder, file.current, blocksOf(image.size));
    else Presence.removeFiles(folder); // a hand-off that died before its last act
    if (known.phase === 'standby')
      await DirtyMap.remove(folder); // of a takeover that died before it was one
    else if (!image.readOnly)
      dirty = DirtyMap.open(folder, { id: known.id, blocks: blocksOf(image.size) }, image.stamp);
    const volume = new Volume(file, image, presence, dirty);
    await volume.heatFile.load();
    await volume.firstAccessFile.load();
    try {
      await volume.markOpen();
    } catch (error) {
      volume.heatFile.stop();
      volume.firstAccessFile.stop();
      throw error;
    }
    return volume;
  } catch (error) {
    dirty?.unmap();
    presence?.close();
    image.close();
    throw error;
  }
}
