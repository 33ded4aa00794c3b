/**
 * The recorded sessions (test/fuzz/seeds, made by record.ts): real clients with our server, and our client with real servers. One file
 * a session: who it was, and the pieces in the order they came, `>` from the client and `<` from the server, in hexadecimal; `00*4096`
 * is a byte so many times.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Conversation } from './conversation.js';
import { OPT, type Unit } from './wire.js';

export const SEEDS_DIR = resolve(fileURLToPath(import.meta.url), '../../../../test/fuzz/seeds');

export interface Piece {
  side: 'client' | 'server';
  bytes: Buffer;
}

export interface Seed {
  name: string;
  pieces: Piece[];
  client: Unit[];
  server: Unit[];
}

/** Runs of one byte that are written short. */
const RUN_MIN = 16;

export function formatPieces(pieces: readonly Piece[]): string[] {
  return pieces.map(({ side, bytes }) => `${side === 'client' ? '>' : '<'} ${formatBytes(bytes)}`);
}

function formatBytes(bytes: Buffer): string {
  const words: string[] = [];
  let plain = 0;
  for (let at = 0; at < bytes.length; ) {
    let end = at + 1;
    while (end < bytes.length && bytes[end] === bytes[at]) end++;
    if (end - at >= RUN_MIN) {
      if (at > plain) words.push(bytes.toString('hex', plain, at));
      words.push(`${bytes.toString('hex', at, at + 1)}*${end - at}`);
      plain = end;
    }
    at = end;
  }
  if (plain < bytes.length) words.push(bytes.toString('hex', plain));
  return words.join(' ');
}

export function parsePieces(lines: readonly string[]): Piece[] {
  return lines.map((line) => {
    const [side, ...words] = line.split(' ');
    const parts = words.map((word) => {
      const [hex, count] = word.split('*') as [string, string | undefined];
      return count === undefined
        ? Buffer.from(hex, 'hex')
        : Buffer.alloc(Number(count), Buffer.from(hex, 'hex'));
    });
    return { side: side === '>' ? 'client' : 'server', bytes: Buffer.concat(parts) };
  });
}

/** A session's units, told apart by reading along. Throws if somebody broke the protocol. */
export function seedOf(name: string, pieces: Piece[]): Seed {
  const seed: Seed = { name, pieces, client: [], server: [] };
  const conversation = new Conversation({ onUnit: (side, unit) => seed[side].push(unit), lenient: true });
  for (const { side, bytes } of pieces) {
    if (side === 'client') conversation.sent(bytes);
    else conversation.received(bytes);
  }
  const breach = conversation.clientBreach ?? conversation.serverBreach ?? conversation.transmission?.lost;
  if (breach != null) throw new Error(`the recording ${name} cannot be read: ${breach}`);
  return seed;
}

/** Whether its client asks for extended headers. */
export function asksExtended({ client }: Seed): boolean {
  return client.some(({ kind, bytes }) => kind === 'option' && bytes.readUInt32BE(8) === OPT.EXTENDED);
}

/** All of `kind`: 'server' recordings are of our server and real clients, 'client' ones of our client and real servers. */
export function loadSeeds(kind: 'server' | 'client'): Seed[] {
  const folder = join(SEEDS_DIR, kind);
  return readdirSync(folder)
    .filter((file) => file.endsWith('.txt'))
    .sort()
    .map((file) => {
      const lines = readFileSync(join(folder, file), 'utf8').split('\n');
      const name = file.slice(0, -'.txt'.length);
      return seedOf(name, parsePieces(lines.filter((line) => line.startsWith('>') || line.startsWith('<'))));
    });
}
