/**
 * The words of the control API: HTTP/JSON on a unix socket, every path below /v1. Requests are checked with these schemas;
 * a failure is answered as {"error": {"code", "message"}} with the HTTP status of its code.
 */

import { z } from 'zod';
import type { ErrorCode } from '../../errors.js';
import {
  type MachineDefinition,
  type MigrationInfo,
  machineDefinitionSchema,
  type RunState,
} from '../../hypervisor/driver.js';
import { isLevel } from '../../nbd/codec/frames.js';
import { COOKIE_MAX } from '../../volume/dirty.js';
import { volumeName } from '../config.js';
import type { RetreatProof, RoundCut, Tracking, VolumeStatus } from '../service.js';

export const REQUEST_BODY_BYTES_MAX = 1 << 20;
export const RESPONSE_BODY_BYTES_MAX = 16 << 20;
/** Longest a long poll may be asked to wait. */
export const WAIT_MS_MAX = 60_000;

/** The HTTP status of every code; also the list of codes a client accepts from a server. */
export const HTTP_STATUS: Record<ErrorCode, number> = {
  usage: 400,
  address: 400,
  bounds: 400,
  'not-found': 404,
  exists: 409,
  phase: 409,
  generation: 409,
  'read-only': 409,
  'image-in-use': 409,
  'image-missing': 409,
  'state-mismatch': 409,
  'source-mismatch': 409,
  'no-space': 507,
  'image-io': 500,
  'transaction-log': 500,
  'state-damaged': 500,
  'source-unreachable': 502,
  'source-io': 502,
  tls: 502,
  protocol: 502,
  closed: 503,
  control: 500,
  hypervisor: 500,
  migration: 409,
  bench: 500,
  timeout: 504,
};

const bytes = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);
const generation = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);
const uri = z.string().min(1).max(4096);
const timeoutMs = z.number().int().min(0).max(WAIT_MS_MAX);
const moveId = z.string().min(1).max(100);
const volumeId = z.string().min(1).max(200);
/** Of a round of changes. */
const cookie = z.number().int().min(1).max(COOKIE_MAX);

export const nothing = z.strictObject({}).default({});

export const createVolume = z.strictObject({
  name: volumeName,
  size: bytes.min(1),
  volumeId,
  /** The source's generation; the takeover's will be higher. */
  generation,
  sourceUri: uri,
  /** Absolute path of the image to create; default: in the daemon's folder for images. */
  image: z.string().min(1).max(4096).startsWith('/', 'an absolute path').optional(),
  /** Limit of the background copy. */
  rateBytesPerSecond: bytes.min(1).nullable().default(null),
  /** Of the link to the source; default: as this daemon is set. */
  compression: z.union([z.literal('off'), z.literal('auto'), z.number().refine(isLevel)]).optional(),
  /** The source tracks its changes, and this is the round: blocks may be here before the takeover. */
  preCopy: z
    .strictObject({
      cookie,
      /** Blocks are copied before the takeover. */
      fills: z.boolean(),
      /** The source tells what changed since this generation, whose image is here. */
      since: generation.nullable(),
    })
    .nullable()
    .default(null),
});
export const track = z.strictObject({ moveId, since: generation.nullable() });
export const cut = z.strictObject({ moveId, cookie });
export const refresh = z.strictObject({ from: cookie, to: cookie });
export const takeover = z.strictObject({ generation: generation.optional() }).default({});
export const seal = z.strictObject({ generation });
export const unseal = z.strictObject({ volumeId, generation });
export const retire = z.strictObject({ deleteImage: z.boolean() });
export const cancelVolume = z.strictObject({ volumeId });
export const rate = z.strictObject({ bytesPerSecond: bytes.min(1).nullable() });
export const prefetch = z.strictObject({ offset: bytes, length: bytes.min(1) });
export const wait = z.strictObject({ timeoutMs });

export const ofMove = z.strictObject({ moveId });
export const stopMachine = z
  .strictObject({ mode: z.enum(['powerdown', 'quit']), timeoutMs })
  .partial()
  .default({});
export const incoming = z.strictObject({ moveId, definition: machineDefinitionSchema });
export const migrate = z.strictObject({ moveId, uri, bandwidthBytesPerSecond: bytes.min(1).nullable() });
export const waitMigration = z.strictObject({
  statuses: z.array(z.string().max(50)).min(1).max(20),
  timeoutMs,
});

export type CreateVolume = z.input<typeof createVolume>;

/** A volume the daemon serves. */
export interface ServedVolume extends VolumeStatus {
  image: string;
  /** What another host's link connects to. */
  linkUri: string | null;
  /** What the image occupies on this host's disk. */
  allocatedBytes: number;
  /** Of a volume that moved away: the generation that its image here still is, if it is known to be untouched. */
  home: number | null;
}

/** A volume that is configured or on disk and could not be opened; the daemon serves the others. */
export interface UnavailableVolume {
  name: string;
  phase: 'unavailable';
  /** Its id, when it moved away from here and is only remembered for that. */
  retiredId: string | null;
  image: string;
  error: string;
  /** As in ServedVolume. */
  home: number | null;
}

export type VolumeView = ServedVolume | UnavailableVolume;

/**
 * stopped    known here, no process
 * departed   moved away from here
 * unmanaged  a process of an earlier daemon holds its disks: this daemon leaves it alone
 * others     as the driver says of its process
 */
export type MachineState = RunState | 'departed' | 'unmanaged';

export interface MachineView {
  name: string;
  state: MachineState;
  /** The hypervisor's own word, null without a process of ours. */
  detail: string | null;
  pid: number | null;
  serialPath: string | null;
  /** The guest ran here: in this process, or, where there is none, since it arrived. */
  ran: boolean;
  /** The move that has it: at the source its claim, at the destination the move it came with. */
  moveId: string | null;
  /** At the destination: where its process waits for the source's. */
  incomingUri: string | null;
  /** At the source, once `migrate` was called. */
  migration: MigrationInfo | null;
  definition: MachineDefinition;
  /** How the last process ended, or why the last start failed. */
  error: string | null;
}

export interface DaemonView {
  name: string;
  kind: 'serve' | 'proxy' | 'host';
  version: string;
  pid: number;
  startedAt: string;
  /** Where volumes that arrive are put, and what is free there. Null: this daemon takes none. */
  images: { path: string; freeBytes: number } | null;
  linkUri: string | null;
}

export interface StatusView {
  daemon: DaemonView;
  volumes: VolumeView[];
  vms: MachineView[];
}

/**
 * What the coordinator needs of one host. `ControlClient` is the real one. Failures are BlockferryError: code 'control' or
 * 'timeout' when it is unknown whether the request was carried out, any other code when the daemon said no.
 */
export interface HostControl {
  readonly address: string;
  status(): Promise<StatusView>;
  volume(name: string): Promise<VolumeView>;
  createVolume(request: CreateVolume): Promise<VolumeView>;
  takeover(name: string, generation?: number): Promise<{ generation: number }>;
  track(name: string, moveId: string, since: number | null): Promise<Tracking>;
  cut(name: string, moveId: string, cookie: number): Promise<RoundCut>;
  untrack(name: string, moveId: string): Promise<void>;
  refresh(name: string, from: number, to: number): Promise<void>;
  seal(name: string, generation: number): Promise<void>;
  unseal(name: string, proof: RetreatProof): Promise<void>;
  retreat(name: string): Promise<RetreatProof>;
  cancelVolume(name: string, volumeId: string): Promise<RetreatProof>;
  retire(name: string, options: { deleteImage: boolean }): Promise<void>;
  setRate(name: string, bytesPerSecond: number | null): Promise<void>;
  waitHandoff(name: string, timeoutMs: number): Promise<{ done: boolean; volume: VolumeView }>;

  machine(name: string): Promise<MachineView>;
  claim(name: string, moveId: string): Promise<void>;
  release(name: string, moveId: string): Promise<void>;
  incoming(name: string, moveId: string, definition: MachineDefinition): Promise<{ uri: string }>;
  migrate(name: string, moveId: string, uri: string, bandwidthBytesPerSecond: number | null): Promise<void>;
  waitMigration(name: string, statuses: readonly string[], timeoutMs: number): Promise<MigrationInfo>;
  migrateContinue(name: string, moveId: string): Promise<void>;
  /** Source: cancels a migration that is under way and lets the guest run; does nothing to one that runs. */
  revive(name: string, moveId: string): Promise<void>;
  waitRunning(name: string, timeoutMs: number): Promise<{ running: boolean }>;
  /** Source: the guest runs elsewhere; its process here quits and is not started again. */
  depart(name: string, moveId: string): Promise<void>;
  /** Destination: its process quits, and the machine is forgotten. */
  discard(name: string, moveId: string): Promise<void>;
}
