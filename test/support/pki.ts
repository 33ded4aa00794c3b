/**
 * Certificates and keys for tests, made with openssl in a folder of their own, in the layout QEMU, nbdkit and libnbd share.
 *
 *     good       ca, server (localhost, 127.0.0.1, disks.example), client "tester"
 *     stranger   all of them once more, by another authority
 *     anonymous  good's ca and server, no client
 *     elsewhere  good's ca, a server for the name elsewhere.example only, good's client
 *     expired    good's ca, server and client of yesterday
 */
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

export interface Pki {
  readonly root: string;
  readonly good: string;
  readonly stranger: string;
  readonly anonymous: string;
  readonly elsewhere: string;
  readonly expired: string;
  /** Folder with a keys.psk of alice and bob, as QEMU wants it; and the file itself. */
  readonly keysFolder: string;
  readonly keys: string;
  /** Another key of alice, and one of carol, whom `keys` does not know. */
  readonly wrongKeys: string;
  remove(): void;
}

const NAMES = 'DNS:localhost,DNS:disks.example,IP:127.0.0.1';

function openssl(...words: string[]): void {
  execFileSync('openssl', words, { stdio: ['ignore', 'ignore', 'pipe'] });
}

const EC = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];

function authority(folder: string, name: string): void {
  mkdirSync(folder);
  const [key, cert] = [join(folder, 'ca-key.pem'), join(folder, 'ca-cert.pem')];
  const usage = ['-addext', 'keyUsage=critical,keyCertSign,cRLSign'];
  openssl(
    'req',
    '-x509',
    ...EC,
    '-keyout',
    key,
    '-out',
    cert,
    '-days',
    '2',
    '-subj',
    `/CN=${name}`,
    ...usage,
  );
}

function signed(
  folder: string,
  side: 'server' | 'client',
  name: string,
  { by = folder, names = NAMES, days = 2 }: { by?: string; names?: string; days?: number } = {},
): void {
  const path = (what: string) => join(folder, `${side}${what}`);
  const extensions = [
    'basicConstraints=critical,CA:FALSE',
    'keyUsage=digitalSignature,keyEncipherment',
    `extendedKeyUsage=${side}Auth`,
    ...(side === 'server' ? [`subjectAltName=${names}`] : []),
  ];
  writeFileSync(path('.ext'), extensions.join('\n'));
  openssl('req', ...EC, '-keyout', path('-key.pem'), '-out', path('.csr'), '-subj', `/CN=${name}`);
  const from = ['-in', path('.csr'), '-CA', join(by, 'ca-cert.pem'), '-CAkey', join(by, 'ca-key.pem')];
  const life = ['-days', String(days), '-CAcreateserial'];
  openssl('x509', '-req', ...from, ...life, '-extfile', path('.ext'), '-out', path('-cert.pem'));
}

function copy(from: string, to: string, ...files: string[]): void {
  mkdirSync(to, { recursive: true });
  for (const file of files) copyFileSync(join(from, file), join(to, file));
}

export function makePki(): Pki {
  const root = mkdtempSync(join(tmpdir(), 'blockferry-pki-'));
  const at = (name: string) => join(root, name);
  const [good, stranger, anonymous, elsewhere, expired] = [
    at('good'),
    at('stranger'),
    at('anonymous'),
    at('elsewhere'),
    at('expired'),
  ];
  for (const folder of [good, stranger]) {
    authority(folder, folder === good ? 'test authority' : 'stranger');
    signed(folder, 'server', 'localhost');
    signed(folder, 'client', 'tester');
  }
  copy(good, anonymous, 'ca-cert.pem', 'server-cert.pem', 'server-key.pem');
  copy(good, elsewhere, 'ca-cert.pem', 'client-cert.pem', 'client-key.pem');
  signed(elsewhere, 'server', 'elsewhere.example', { by: good, names: 'DNS:elsewhere.example' });
  copy(good, expired, 'ca-cert.pem');
  for (const side of ['server', 'client'] as const)
    signed(expired, side, 'localhost', { by: good, days: -1 });

  const keysFolder = at('psk');
  mkdirSync(keysFolder);
  const keys = join(keysFolder, 'keys.psk');
  const wrongKeys = at('wrong.psk');
  writeFileSync(keys, `alice:${'0123456789abcdef'.repeat(4)}\nbob:${'fedcba9876543210'.repeat(4)}\n`);
  writeFileSync(wrongKeys, `alice:${'00'.repeat(32)}\ncarol:${'11'.repeat(32)}\n`);
  const remove = () => rmSync(root, { recursive: true, force: true });
  return { root, good, stranger, anonymous, elsewhere, expired, keysFolder, keys, wrongKeys, remove };
}
