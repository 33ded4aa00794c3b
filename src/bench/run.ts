/** A whole comparison: the cells that were asked for, and hits beside misses. */

import { BlockferryError } from '../errors.js';
import { QUICK, selectCells } from './cells.js';
import { type CompareOptions, compareServers, type Tell } from './compare.js';
import { machineFactsHere } from './facts.js';
import { measureHits } from './hits.js';
import type { Report } from './report.js';
import { SERVERS } from './servers.js';

/** The filter for hits beside misses, which are no cell of the matrix. */
export const HITS_FILTER = 'hits';

export interface ComparisonOptions
  extends Pick<CompareOptions, 'rounds' | 'durationMs' | 'warmupMs' | 'imageBytes' | 'folder' | 'tool'> {
  /** Filters (`selectCells`); none: everything. */
  only: readonly string[];
  quick: boolean;
  /** Servers by name, or a part of one; none: all. */
  servers: readonly string[];
}

const IMAGE_UNIT_BYTES = 4 << 20;

/** Throws 'usage' or 'bench'. */
export async function runComparison(options: ComparisonOptions, tell: Tell): Promise<Report> {
  if (options.imageBytes < IMAGE_UNIT_BYTES || options.imageBytes % IMAGE_UNIT_BYTES !== 0)
    throw new BlockferryError('usage', 'images are a multiple of 4 MiB');
  const servers = SERVERS.filter(
    ({ name }) => options.servers.length === 0 || options.servers.some((part) => name.includes(part)),
  );
  if (servers.length === 0) {
    const names = SERVERS.map(({ name }) => name).join(', ');
    throw new BlockferryError(
      'usage',
      `no server is called ${options.servers.join(' or ')}: there is ${names}`,
    );
  }
  const filters = options.quick ? [...QUICK, ...options.only] : options.only;
  const wanted = filters.filter((filter) => filter !== HITS_FILTER);
  const cells = filters.length > 0 && wanted.length === 0 ? [] : selectCells(wanted);
  const report: Report =
    cells.length > 0
      ? await compareServers({ ...options, cells, servers }, tell)
      : { version: 1, machine: machineFactsHere(), servers: [], leftOut: [], cells: [] };
  // They have servers of their own.
  const withHits = filters.length === 0 ? options.tool === 'load' : filters.includes(HITS_FILTER);
  const hits = withHits ? await measureHits(options, report.leftOut, tell) : null;
  return hits === null ? report : { ...report, hits };
}
