/**
 * Servers side by side. All of a group (a place for images and a transport) run at once, each with an image of its own and the same content,
 * and idle while another one is loaded; each round loads them in turn (A B C, B C A, ...), cell by cell, so that what else the machine
 * does and how it heats up meets all of them. Before each round all images get other memory, which is not equally fast everywhere.
 */

import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { BlockferryError, messageOf } from '../errors.js';
import type { Cell } from './cells.js';
import { loadOf } from './cells.js';
import { machineFactsHere } from './facts.js';
import { runFio } from './fio.js';
import { dropFromCache, makeImage, renewMemory, settle, withImageFolder } from './images.js';
import { LOAD_DEFAULTS, runLoad } from './load.js';
import { cpuMsOf, peakBytesOf, resetPeak } from './processes.js';
import type { Place, RunningServer } from './program.js';
import type { CellResult, Report, Sample, ServerFacts } from './report.js';
import { ourVersion, type ServerKind } from './servers.js';

export interface CompareOptions {
  cells: readonly Cell[];
  servers: readonly ServerKind[];
  rounds: number;
  durationMs: number;
  warmupMs: number;
  /** Of each image; a multiple of 4 MiB. */
  imageBytes: number;
  /** Where images on a disk are kept (default: the system's folder for temporary files). */
  folder?: string;
  tool: 'load' | 'fio';
}

/** Told what is going on, a line at a time. */
export type Tell = (line: string) => void;

interface Contestant {
  kind: ServerKind;
  server: RunningServer;
  image: string;
}

/** Throws 'bench' if one of our own servers, or a server under load, fails. */
export async function compareServers(options: CompareOptions, tell: Tell): Promise<Report> {
  const known = new Map<string, ServerFacts>();
  const leftOut = new Set<string>();
  const cells: CellResult[] = [];
  for (const group of groupsOf(options.cells)) {
    const { placement } = group[0];
    // One more for what a proxy copies from.
    const needBytes = options.imageBytes * (options.servers.length + 1);
    const found = await withImageFolder(placement, options.folder, needBytes, (folder) =>
      compareGroup(group, folder, options, { known, leftOut }, tell),
    );
    cells.push(...found);
  }
  return {
    version: 1,
    machine: machineFactsHere(),
    servers: [...known.values()],
    leftOut: [...leftOut],
    cells,
  };
}

/** What is found out about the servers on the way. */
interface Findings {
  known: Map<string, ServerFacts>;
  leftOut: Set<string>;
}

async function compareGroup(
  group: readonly Cell[],
  folder: string,
  options: CompareOptions,
  { known, leftOut }: Findings,
  tell: Tell,
): Promise<CellResult[]> {
  const { placement, transport } = group[0];
  const contestants: Contestant[] = [];
  try {
    tell(`${placement}, ${transport}: making images and starting servers`);
    for (const kind of options.servers) {
      const contestant = await enter(kind, folder, transport, options.imageBytes, leftOut);
      if (contestant === null) continue;
      contestants.push(contestant);
      known.set(kind.name, factsOf(contestant, known));
    }
    return await measureGroup(group, contestants, options, tell);
  } finally {
    for (const { server } of contestants.reverse()) await server.stop();
  }
}

function groupsOf(cells: readonly Cell[]): Cell[][] {
  const groups = new Map<string, Cell[]>();
  for (const cell of cells) {
    const key = `${cell.placement} ${cell.transport}`;
    groups.set(key, [...(groups.get(key) ?? []), cell]);
  }
  return [...groups.values()];
}

/** Starts a server on an image of its own; null, and why in `leftOut`, if it is a peer that cannot be had. */
async function enter(
  kind: ServerKind,
  folder: string,
  transport: Place['transport'],
  imageBytes: number,
  leftOut: Set<string>,
): Promise<Contestant | null> {
  if (kind.version() === null) {
    leftOut.add(`${kind.name}: not installed`);
    return null;
  }
  const own = join(folder, kind.name.replaceAll(/\W+/g, '-'));
  mkdirSync(own);
  const image = join(own, 'disk.img');
  const original = join(folder, 'original.img');
  if (kind.brings !== true) await makeImage(image, imageBytes);
  else await makeImage(original, imageBytes);
  try {
    return { kind, image, server: await kind.start({ folder: own, image, original, transport }) };
  } catch (error) {
    if (kind.ours) throw error;
    leftOut.add(`${kind.name}: ${messageOf(error)}`);
    return null;
  } finally {
    rmSync(original, { force: true });
  }
}

/** The command line is that of the first place it ran in; the others differ in the address only. */
function factsOf({ kind, server }: Contestant, known: ReadonlyMap<string, ServerFacts>): ServerFacts {
  const { name, ours } = kind;
  return known.get(name) ?? { name, ours, version: kind.version() ?? '', commandLine: server.commandLine };
}

async function measureGroup(
  cells: readonly Cell[],
  contestants: readonly Contestant[],
  options: CompareOptions,
  tell: Tell,
): Promise<CellResult[]> {
  const version = ourVersion();
  const results = cells.map((cell): CellResult => {
    const { rounds, imageBytes, tool } = options;
    const seconds = options.durationMs / 1000;
    const samples = Object.fromEntries(contestants.map(({ kind }): [string, Sample[]] => [kind.name, []]));
    return {
      name: cell.name,
      ourVersion: version,
      measuredAt: new Date().toISOString(),
      tool,
      rounds,
      seconds,
      imageBytes,
      samples,
    };
  });
  const images = contestants.map(({ image }) => image);
  for (let round = 0; round < options.rounds; round++) {
    await renewMemory(images, options.imageBytes, cells[0].placement, round);
    for (const [index, cell] of cells.entries()) {
      tell(`round ${round + 1} of ${options.rounds}: ${cell.name}`);
      for (let turn = 0; turn < contestants.length; turn++) {
        const contestant = contestants[(turn + round) % contestants.length];
        results[index].samples[contestant.kind.name].push(await measure(contestant, cell, round, options));
      }
    }
  }
  return results;
}

async function measure(
  { kind, server, image }: Contestant,
  cell: Cell,
  round: number,
  options: CompareOptions,
): Promise<Sample> {
  if (cell.placement === 'cold') await dropFromCache(image);
  resetPeak(server.pid);
  const cpuBefore = cpuMsOf(server.pid);
  try {
    const sample =
      options.tool === 'fio'
        ? await sampleOfFio(server, cell, options, cpuBefore)
        : await sampleOfLoad(server, cell, options, cpuBefore);
    if (cell.work !== 'read' && cell.placement !== 'tmpfs') await settle(image);
    return { round, ...sample };
  } catch (error) {
    throw new BlockferryError('bench', `${kind.name}, ${cell.name}: ${messageOf(error)}`, { cause: error });
  }
}

type Measured = Omit<Sample, 'round'>;

async function sampleOfLoad(
  server: RunningServer,
  cell: Cell,
  options: CompareOptions,
  cpuBefore: number,
): Promise<Measured> {
  let cpuMs = 0;
  let peakBytes = 0;
  // Before the connections close: with them go a server's processes, and the memory they had.
  const whileConnected = (): void => {
    cpuMs = cpuMsOf(server.pid) - cpuBefore;
    peakBytes = peakBytesOf(server.pid);
  };
  const result = await runLoad(server.uri, loadOf(cell, options), { whileConnected });
  const operations = result.reads + result.writes;
  if (operations === 0) throw new BlockferryError('bench', 'nothing was answered in time: measure longer');
  const { p50, p99, p999, max } = result.latencyNs;
  return {
    opsPerSecond: operations / (result.elapsedNs / 1e9),
    bytesPerSecond: result.bytes / (result.elapsedNs / 1e9),
    p50Us: p50 / 1000,
    p99Us: p99 / 1000,
    p999Us: p999 / 1000,
    maxUs: max / 1000,
    // All that it did, warmed up or not: CPU time is counted from the first connection on.
    serverCpuUs: (cpuMs * 1000) / (result.totalReads + result.totalWrites),
    clientCpuUs: result.cpuNs / 1000 / operations,
    clientBusy: result.cpuNs / result.elapsedNs,
    peakBytes,
  };
}

async function sampleOfFio(
  server: RunningServer,
  cell: Cell,
  options: CompareOptions,
  cpuBefore: number,
): Promise<Measured> {
  // What fio does while it warms up is in no count of its.
  const result = await runFio(server.uri, { ...LOAD_DEFAULTS, ...loadOf(cell, options), warmupMs: 0 });
  const { p50, p99, p999, max } = result.latencyNs;
  return {
    opsPerSecond: result.opsPerSecond,
    bytesPerSecond: result.bytesPerSecond,
    p50Us: p50 / 1000,
    p99Us: p99 / 1000,
    p999Us: p999 / 1000,
    maxUs: max / 1000,
    serverCpuUs: ((cpuMsOf(server.pid) - cpuBefore) * 1000) / result.totalOperations,
    clientCpuUs: result.cpuNs / 1000 / result.totalOperations,
    clientBusy: result.cpuNs / result.elapsedNs,
    peakBytes: peakBytesOf(server.pid),
  };
}
