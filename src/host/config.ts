/** The configuration of `blockferry host`: a YAML file, checked word by word before anything is opened. */

import { readFileSync } from 'node:fs';
import { isAbsolute, join, resolve } from 'node:path';
import { parseDocument } from 'yaml';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import { type MachineDefinition, machineDefinitionSchema } from '../hypervisor/driver.js';
import { type Compression, isLevel } from '../nbd/codec/frames.js';
import { CONNECTIONS_MAX, HANDSHAKE_TIMEOUT_MS, HANDSHAKES_MAX } from '../nbd/constants.js';
import type { TransactionLogSettings } from '../nbd/log/transaction-log.js';
import { ACCESS_RULES_MAX, type AccessRule, parseAccessRule, unprovable } from '../nbd/server/access.js';
import type { ClientTlsSettings, ServerTlsSettings, TlsMode } from '../nbd/tls.js';
import { SEEDS_MAX } from '../relocation/seeds.js';
import type { ExportPolicy, ListenLimits } from './parts.js';
import { defaultStateDir, RESERVED_NAMES } from './state-dir.js';
import { defaultDataThreads } from './threads/default.js';

const CONFIG_BYTES_MAX = 1 << 20;
const NAME_BYTES_MAX = 128;
const VOLUMES_MAX = 4096;
const MACHINES_MAX = 1024;
const DATA_THREADS_MAX = 64;

/** Names become folder, socket and export names, so they are plain words. */
export const volumeName = z
  .string()
  .max(NAME_BYTES_MAX, `a name of at most ${NAME_BYTES_MAX} characters`)
  .regex(
    /^[A-Za-z0-9_][A-Za-z0-9._-]*$/,
    'a name of letters, digits, ".", "_" and "-" that starts with neither "." nor "-"',
  )
  .refine(
    (name) => !RESERVED_NAMES.has(name),
    "a name other than blockferry's own folders in the state folder",
  );
/** Part of the control socket's name. */
const daemonName = volumeName;

const noNul = z.string().refine((text) => !text.includes('\0'), 'text without NUL bytes');
const path = noNul.min(1, 'a path');

/** Absent: no TLS, neither at the link address nor towards sources. */
const tlsSchema = z
  .strictObject({
    mode: z.enum(['off', 'allowed', 'required']).default('required'),
    certificates: path.optional(),
    psk: path.optional(),
    username: noNul.min(1).max(256).optional(),
    hostname: noNul.min(1).max(255).optional(),
    verifyPeer: z.boolean().default(true),
  })
  .refine(
    ({ certificates, psk }) => (certificates === undefined) !== (psk === undefined),
    'either certificates or psk, one of the two',
  );

const accessRule = z.string().transform((text, context) => {
  try {
    return parseAccessRule(text);
  } catch (error) {
    context.addIssue({ code: 'custom', message: messageOf(error) });
    return z.NEVER;
  }
});
const access = z.array(accessRule).max(ACCESS_RULES_MAX);

const CLIENTS_MAX = 65_536;
const clients = z.number().int().min(1).max(CLIENTS_MAX);
const transactionLogSchema = z.strictObject({ file: path, data: z.boolean().default(false) });

const configSchema = z.strictObject({
  name: daemonName,
  stateDir: path.optional(),
  control: path.optional(),
  link: noNul.default('127.0.0.1:0'),
  tls: tlsSchema.optional(),
  access: access.optional(),
  listExports: z.boolean().default(true),
  compression: z
    .union([z.literal('off'), z.literal('auto'), z.number().refine(isLevel, 'is no level')])
    .default('auto'),
  limits: z
    .strictObject({
      connections: clients.default(CONNECTIONS_MAX),
      handshakes: clients.default(HANDSHAKES_MAX),
      handshakeSeconds: z
        .number()
        .min(0.1)
        .max(3600)
        .default(HANDSHAKE_TIMEOUT_MS / 1000),
    })
    .prefault({}),
  orderFrom: path.optional(),
  seeds: z.array(path).max(SEEDS_MAX).default([]),
  images: path.optional(),
  run: path.optional(),
  migrationAddress: noNul.min(1).default('127.0.0.1'),
  stopTimeoutSeconds: z.number().min(0).max(3600).default(30),
  dataThreads: z.number().int().min(0).max(DATA_THREADS_MAX).optional(),
  volumes: z
    .array(
      z.strictObject({
        name: volumeName,
        image: path,
        tlsOnly: z.boolean().default(false),
        access: access.optional(),
        connections: clients.optional(),
        transactionLog: transactionLogSchema.optional(),
      }),
    )
    .max(VOLUMES_MAX)
    .default([]),
  vms: z
    .array(z.strictObject({ ...machineDefinitionSchema.shape, autostart: z.boolean().default(false) }))
    .max(MACHINES_MAX)
    .default([]),
});

/** A checked configuration: every path absolute, every default filled in. */
export interface HostConfig {
  name: string;
  stateDir: string;
  /** Path of the control socket. */
  control: string;
  /** Where other hosts read from: an ADDR. */
  link: string;
  /** TLS at the link address; null: none. */
  linkTls: ServerTlsSettings | null;
  /** What sources with TLS are asked with, where their URIs leave it open. */
  sourceTls: ClientTlsSettings | null;
  /** Names of the volumes that the link address gives to clients behind TLS only. */
  tlsOnly: ReadonlySet<string>;
  /** Whom the link address gives volumes that have no rules of their own; null: everybody. */
  access: readonly AccessRule[] | null;
  /** Of links, in either direction. */
  compression: Compression;
  /** The link address tells its volumes' names. */
  listExports: boolean;
  limits: ListenLimits;
  /** Path of the record that volumes which arrive are copied by, where their source tells none; null: none. */
  orderFrom: string | null;
  /** Images in which blocks of volumes that arrive are looked for first. */
  seeds: readonly string[];
  /** Folder for the images of volumes that arrive. */
  images: string;
  /** Folder for sockets. */
  run: string;
  /** Host or IP at which an incoming QEMU listens. */
  migrationAddress: string;
  /** How long a guest may take to power off when the daemon stops. */
  stopTimeoutMs: number;
  /** Threads that volumes are spread over, at most; 0: they are on the main thread. */
  dataThreads: number;
  volumes: {
    name: string;
    image: string;
    access?: readonly AccessRule[];
    connectionsMax?: number;
    transactionLog?: TransactionLogSettings;
  }[];
  vms: { definition: MachineDefinition; autostart: boolean }[];
}

/** "vms[0].disks[1].node: expected ..." */
export function describeIssues(error: z.ZodError, whole: string): string {
  return error.issues
    .slice(0, 5)
    .map((issue) => {
      const where = issue.path.reduce<string>(
        (text, key) =>
          text + (typeof key === 'number' ? `[${key}]` : text === '' ? String(key) : `.${String(key)}`),
        '',
      );
      return `${where === '' ? whole : where}: ${issue.message.replace(/^Invalid input: /, '')}`;
    })
    .join('; ');
}

function duplicates(names: string[]): string | undefined {
  return names.find((name, index) => names.indexOf(name) !== index);
}

/** Checks `text`, the content of a configuration file in the folder `base`. Fails with 'usage'. */
export function parseConfig(text: string, base: string, file = 'configuration'): HostConfig {
  const document = parseDocument(text, { prettyErrors: true });
  if (document.errors.length > 0) {
    throw new BlockferryError('usage', `${file} is no YAML: ${document.errors[0].message.split('\n')[0]}`);
  }
  let raw: unknown;
  try {
    raw = document.toJS({ maxAliasCount: 100 });
  } catch (error) {
    throw new BlockferryError('usage', `${file} is no YAML: ${messageOf(error)}`, { cause: error });
  }
  const result = configSchema.safeParse(raw ?? {});
  if (!result.success)
    throw new BlockferryError('usage', `${file}: ${describeIssues(result.error, 'the file')}`);
  const config = result.data;
  const twice = duplicates(config.volumes.map((volume) => volume.name));
  if (twice !== undefined) throw new BlockferryError('usage', `${file}: volumes: "${twice}" is there twice`);
  const twin = duplicates(config.vms.map((vm) => vm.name));
  if (twin !== undefined) throw new BlockferryError('usage', `${file}: vms: "${twin}" is there twice`);
  checkDisks(config.vms, file);
  checkRules(config, file);

  const absolute = (word: string): string => (isAbsolute(word) ? word : resolve(base, word));
  const stateDir = absolute(config.stateDir ?? defaultStateDir());
  return {
    name: config.name,
    stateDir,
    control: absolute(config.control ?? join(stateDir, 'control', `${config.name}.sock`)),
    link: config.link,
    ...tlsOf(config.tls, absolute),
    tlsOnly: tlsOnlyOf(config.volumes, config.tls?.mode ?? 'off', file),
    access: config.access ?? null,
    compression: config.compression,
    listExports: config.listExports,
    limits: {
      connectionsMax: config.limits.connections,
      handshakesMax: config.limits.handshakes,
      handshakeTimeoutMs: config.limits.handshakeSeconds * 1000,
    },
    orderFrom: config.orderFrom === undefined ? null : absolute(config.orderFrom),
    seeds: config.seeds.map(absolute),
    images: absolute(config.images ?? join(stateDir, 'images')),
    run: absolute(config.run ?? join(stateDir, 'run')),
    migrationAddress: config.migrationAddress,
    stopTimeoutMs: config.stopTimeoutSeconds * 1000,
    dataThreads: config.dataThreads ?? defaultDataThreads(),
    volumes: config.volumes.map(({ name, image, access: rules, connections, transactionLog }) => ({
      name,
      image: absolute(image),
      ...(rules === undefined ? {} : { access: rules }),
      ...(connections === undefined ? {} : { connectionsMax: connections }),
      ...(transactionLog === undefined
        ? {}
        : { transactionLog: { path: absolute(transactionLog.file), data: transactionLog.data } }),
    })),
    vms: config.vms.map(({ autostart, ...definition }) => ({ definition, autostart })),
  };
}

function tlsOf(
  config: z.infer<typeof tlsSchema> | undefined,
  absolute: (word: string) => string,
): Pick<HostConfig, 'linkTls' | 'sourceTls'> {
  if (config === undefined) return { linkTls: null, sourceTls: null };
  const { mode, certificates, psk, username, hostname, verifyPeer } = config;
  const files = {
    ...(certificates === undefined ? {} : { certificates: absolute(certificates) }),
    ...(psk === undefined ? {} : { pskFile: absolute(psk) }),
  };
  return {
    linkTls:
      mode === 'off' ? null : { mode, verifyPeer, ...files, ...(hostname === undefined ? {} : { hostname }) },
    sourceTls: { ...files, ...(username === undefined ? {} : { username }) },
  };
}

function tlsOnlyOf(
  volumes: readonly { name: string; tlsOnly: boolean }[],
  mode: TlsMode,
  file: string,
): ReadonlySet<string> {
  const names = volumes.filter(({ tlsOnly }) => tlsOnly).map(({ name }) => name);
  if (names.length > 0 && mode === 'off')
    throw new BlockferryError(
      'usage',
      `${file}: volumes: "${names[0]}" is tlsOnly, and there is no TLS: set tls.mode to allowed or required`,
    );
  return new Set(names);
}

/** Rules with a name that no client of the link address can prove. */
function checkRules(config: z.infer<typeof configSchema>, file: string): void {
  const { tls, volumes } = config;
  const proving =
    tls === undefined || tls.mode === 'off'
      ? undefined
      : {
          ...(tls.certificates === undefined ? {} : { certificates: tls.certificates }),
          ...(tls.psk === undefined ? {} : { pskFile: tls.psk }),
          verifyPeer: tls.verifyPeer,
        };
  const lists = [{ path: 'access', rules: config.access }].concat(
    volumes.map((volume, index) => ({ path: `volumes[${index}].access`, rules: volume.access })),
  );
  for (const { path: where, rules } of lists) {
    const lacking = unprovable(rules ?? [], proving);
    if (lacking === undefined) continue;
    const needed = lacking === 'psk' ? 'tls.psk' : 'tls.certificates and tls.verifyPeer';
    throw new BlockferryError(
      'usage',
      `${file}: ${where}: a rule with ${lacking}= needs ${needed}, or nobody can prove that name`,
    );
  }
}

/** Whom a volume is for at the link address, those that arrive included. */
export function linkPolicyOf(config: HostConfig, volume: string): ExportPolicy {
  const rules = config.volumes.find(({ name }) => name === volume)?.access ?? config.access;
  return {
    ...guestPolicyOf(config, volume),
    tlsOnly: config.tlsOnly.has(volume),
    ...(rules === null ? {} : { access: rules }),
  };
}

/** At its own socket, which is in a folder for this user only: rules would keep its machine from its disk. */
export function guestPolicyOf(config: HostConfig, volume: string): ExportPolicy {
  const { connectionsMax } = config.volumes.find(({ name }) => name === volume) ?? {};
  return connectionsMax === undefined ? {} : { connectionsMax };
}

/** A volume attached twice would have two writers at once. Volumes that are not listed may arrive later, so they are allowed. */
function checkDisks(vms: MachineDefinition[], file: string): void {
  const owner = new Map<string, string>();
  for (const vm of vms) {
    for (const disk of vm.disks) {
      const other = owner.get(disk.volume);
      if (other !== undefined) {
        throw new BlockferryError(
          'usage',
          `${file}: vms: volume "${disk.volume}" is a disk of "${other}" and of "${vm.name}"`,
        );
      }
      owner.set(disk.volume, vm.name);
    }
    const node = duplicates(vm.disks.map((disk) => disk.node));
    if (node !== undefined)
      throw new BlockferryError('usage', `${file}: vms: "${vm.name}" has node "${node}" twice`);
  }
}

/** Reads and checks a configuration file; relative paths in it are relative to its folder. Fails with 'usage'. */
export function readConfig(file: string): HostConfig {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    throw new BlockferryError('usage', `configuration ${file} cannot be read: ${messageOf(error)}`, {
      cause: error,
    });
  }
  if (text.length > CONFIG_BYTES_MAX)
    throw new BlockferryError('usage', `configuration ${file} is larger than 1 MiB`);
  return parseConfig(text, resolve(file, '..'), file);
}
