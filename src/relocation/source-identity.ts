/** What a source says of itself, and whether it is still the disk it was: by size, or by volume and generation where it tells them. */

import { BlockferryError } from '../errors.js';
import { NbdClient } from '../nbd/client/client.js';
import type { ClientTlsSettings } from '../nbd/tls.js';
import { whyNotReadable } from './reading.js';

/** For a source to accept a connection. */
export const CONNECT_TIMEOUT_MS = 10_000;

/** What a source says of itself. */
export interface SourceFacts {
  size: number;
  description: string;
}

/** How a blockferry names a volume to its links. */
export function describeVolume(id: string, generation: number): string {
  return `blockferry volume ${id} generation ${generation}`;
}

/** The export with the hashes of a volume's. No volume can have such a name. */
export function hashesNameOf(exportName: string): string {
  return `${exportName}/sha256`;
}

const DESCRIPTION = /^blockferry volume (\S+) generation (\d+)$/;

/** The volume that a blockferry source says it is; undefined for any other source. */
export function volumeDescribed(description: string): string | undefined {
  return DESCRIPTION.exec(description)?.[1];
}

/** Why a source that was met as `known` must not be read from as `now`; undefined if it may. */
export function whyNotTheSame(
  known: { size: number; description: string | null },
  now: SourceFacts,
): string | undefined {
  if (now.size !== known.size) return `its size is ${now.size} bytes, not ${known.size}`;
  if (
    known.description === null ||
    !DESCRIPTION.test(known.description) ||
    now.description === known.description
  )
    return undefined;
  return `it was '${known.description}' and is '${now.description}' now`;
}

/** Asks a source once what it is. Throws what NbdClient.connect does, and 'source-mismatch' for what cannot be a source. */
export async function probeSource(uri: string, tls: ClientTlsSettings = {}): Promise<SourceFacts> {
  const client = await NbdClient.connect(uri, { connectTimeoutMs: CONNECT_TIMEOUT_MS, tls });
  const { size, description } = client.info;
  const why = whyNotReadable(client.info);
  await client.close();
  if (why !== undefined) throw new BlockferryError('source-mismatch', `${uri} cannot be a source: ${why}`);
  return { size, description };
}
