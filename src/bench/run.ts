/** A whole comparison: the cells that were asked for, and what is no cell of the matrix. */

import { BlockferryError } from '../errors.js';
import { EVERYTHING, selectCells } from './cells.js';
import { type CompareOptions, compareServers, type Tell } from './compare.js';
import { machineFactsHere } from './facts.js';
import { measureHits } from './hits.js';
import { IMAGE_UNIT_BYTES } from './images.js';
import type { Report } from './report.js';
import { SERVERS } from './servers.js';
import { measureVolumes } from './volumes.js';

/** Filters for what is no cell of the matrix and has servers of its own. */
export const SPECIAL_FILTERS = ['hits', 'volumes'] as const;

export interface ComparisonOptions
  extends Pick<CompareOptions, 'rounds' | 'durationMs' | 'warmupMs' | 'imageBytes' | 'folder' | 'tool'> {
  /** Filters (`selectCells`, SPECIAL_FILTERS). */
  only: readonly string[];
  /** Servers by name, or a part of one; none: all. */
  servers: readonly string[];
}

/** Throws 'usage' or 'bench'. */
export async function runComparison(options: ComparisonOptions, tell: Tell): Promise<Report> {
  if (options.imageBytes < IMAGE_UNIT_BYTES || options.imageBytes % IMAGE_UNIT_BYTES !== 0)
    throw new BlockferryError('usage', 'images are a multiple of 4 MiB');
  const servers = serversCalled(options.servers);
  const filters = options.only;
  const special = new Set<string>(
    // fio is a check of the matrix's load.
    filters.includes(EVERYTHING) && options.tool === 'load'
      ? SPECIAL_FILTERS
      : SPECIAL_FILTERS.filter((name) => filters.includes(name)),
  );
  const wanted = filters.filter((filter) => !special.has(filter));
  const cells = wanted.length === 0 ? [] : selectCells(wanted);
  const report: Report =
    cells.length > 0
      ? await compareServers({ ...options, cells, servers }, tell)
      : { version: 1, machine: machineFactsHere(), servers: [], leftOut: [], cells: [] };
  const hits = special.has('hits') ? await measureHits(options, report.leftOut, tell) : null;
  if (hits !== null) report.hits = hits;
  if (special.has('volumes')) report.volumes = await measureVolumes(options, tell);
  return report;
}

function serversCalled(parts: readonly string[]): typeof SERVERS {
  const servers = SERVERS.filter(
    ({ name }) => parts.length === 0 || parts.some((part) => name.includes(part)),
  );
  if (servers.length > 0) return servers;
  const names = SERVERS.map(({ name }) => name).join(', ');
  throw new BlockferryError('usage', `no server is called ${parts.join(' or ')}: there is ${names}`);
}
