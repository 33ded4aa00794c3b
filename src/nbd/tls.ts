/**
 * TLS credentials of a server and of a client: read from files, checked, and ready to be used.
 *
 * Two kinds, never mixed. x509: a folder in the layout that QEMU, nbdkit and libnbd share (ca-cert.pem, ca-crl.pem, server-cert.pem,
 * server-key.pem, client-cert.pem, client-key.pem). PSK: a file of `NAME:HEXKEY` lines, as GnuTLS' psktool writes it.
 * TLS 1.2 at least. No tickets: nobody resumes a session, and a resumed one would not be checked again. No renegotiation.
 * Everything wrong with files is a BlockferryError 'tls' of one line.
 */
import { constants, createPrivateKey, X509Certificate } from 'node:crypto';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { isIP } from 'node:net';
import { homedir, userInfo } from 'node:os';
import { join } from 'node:path';
import tls from 'node:tls';
import { BlockferryError, messageOf } from '../errors.js';

export type TlsMode = 'off' | 'allowed' | 'required';

/** Where a client's credentials are and what it expects of the server. Whatever is absent has its default. */
export interface ClientTlsSettings {
  /** Folder. Default: libnbd's (see `defaultCertificates`), else no certificate of ours and the authorities Node trusts. */
  readonly certificates?: string;
  /** File of keys; rules out certificates. */
  readonly pskFile?: string;
  /** Which key of `pskFile`. Default: the name of this user. */
  readonly username?: string;
  /** Name in the server's certificate. Default: the host of the URI; over a unix socket any name will do. */
  readonly hostname?: string;
  /** False: any certificate will do. Default: true. */
  readonly verifyPeer?: boolean;
}

/** Largest file of certificates or keys that is read, bytes. */
export const TLS_FILE_BYTES_MAX = 1 << 20;
/** Longest name and key of a line. Source: OpenSSL 3.0, PSK_MAX_IDENTITY_LEN and PSK_MAX_PSK_LEN. */
const PSK_NAME_BYTES_MAX = 256;
const PSK_KEY_BYTES_MAX = 512;

/**
 * Suites for keys: with forward secrecy only. A key without a hash of its own goes with SHA-256 in TLS 1.3 (RFC 8446, 4.2.11);
 * level 0 because OpenSSL counts the strength of certificates there are none of.
 */
const PSK_CIPHERS =
  'TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:kECDHEPSK+CHACHA20:kECDHEPSK+AES:!SHA1:kECDHEPSK+AES+SHA1:@SECLEVEL=0';

const COMMON: tls.SecureContextOptions = {
  minVersion: 'TLSv1.2',
  honorCipherOrder: true,
  secureOptions: constants.SSL_OP_NO_TICKET | constants.SSL_OP_NO_RENEGOTIATION,
};

function wrong(message: string, cause?: unknown): BlockferryError {
  return new BlockferryError('tls', message, { cause });
}

function readSmall(path: string): Buffer {
  try {
    if (statSync(path).size > TLS_FILE_BYTES_MAX) throw new Error('it is larger than 1 MiB');
    return readFileSync(path);
  } catch (error) {
    throw wrong(`cannot read ${path}: ${messageOf(error)}`, error);
  }
}

/** One side's certificate and key, which must fit and be of today. */
function readPair(folder: string, side: 'server' | 'client'): { cert: Buffer; key: Buffer } {
  const [certPath, keyPath] = [join(folder, `${side}-cert.pem`), join(folder, `${side}-key.pem`)];
  const cert = readSmall(certPath);
  const key = readSmall(keyPath);
  let parsed: X509Certificate;
  try {
    parsed = new X509Certificate(cert);
  } catch (error) {
    throw wrong(`${certPath} holds no PEM certificate: ${messageOf(error)}`, error);
  }
  let fits: boolean;
  try {
    fits = parsed.checkPrivateKey(createPrivateKey(key));
  } catch (error) {
    throw wrong(`${keyPath} holds no PEM key without a passphrase: ${messageOf(error)}`, error);
  }
  if (!fits) throw wrong(`${keyPath} is not the key of ${certPath}: put the two that belong together there`);
  const now = Date.now();
  if (now > Date.parse(parsed.validTo))
    throw wrong(`${certPath} has expired (${parsed.validTo}): renew the certificate`);
  if (now < Date.parse(parsed.validFrom))
    throw wrong(`${certPath} is not valid before ${parsed.validFrom}: check the clock or the certificate`);
  return { cert, key };
}

interface Authorities {
  ca?: Buffer;
  crl?: Buffer;
}

function readAuthorities(folder: string, required: boolean): Authorities {
  const [caPath, crlPath] = [join(folder, 'ca-cert.pem'), join(folder, 'ca-crl.pem')];
  const authorities: Authorities = {};
  if (required || existsSync(caPath)) {
    authorities.ca = readSmall(caPath);
    try {
      new X509Certificate(authorities.ca);
    } catch (error) {
      throw wrong(`${caPath} holds no PEM certificate: ${messageOf(error)}`, error);
    }
  }
  if (existsSync(crlPath)) authorities.crl = readSmall(crlPath);
  return authorities;
}

/** A context made of what was read; also the last check of it. */
function contextOf(options: tls.SecureContextOptions, from: string): tls.SecureContext {
  try {
    return tls.createSecureContext(options);
  } catch (error) {
    throw wrong(`the TLS credentials in ${from} cannot be used: ${messageOf(error)}`, error);
  }
}

/** The keys of a file, by name. Throws 'tls'. */
export function readPskFile(path: string): Map<string, Buffer> {
  const keys = new Map<string, Buffer>();
  const lines = readSmall(path).toString().split('\n');
  lines.forEach((line, index) => {
    if (line.trim() === '') return;
    const where = `${path}, line ${index + 1}`;
    const match = /^([^:#][^:]*):((?:[0-9a-f]{2})+)\s*$/i.exec(line);
    if (match === null) throw wrong(`${where} is not NAME:HEXKEY, as psktool writes it`);
    const [, name, hex] = match as unknown as [string, string, string];
    if (Buffer.byteLength(name) > PSK_NAME_BYTES_MAX || hex.length > 2 * PSK_KEY_BYTES_MAX)
      throw wrong(`${where}: a name has ${PSK_NAME_BYTES_MAX} bytes at most, a key ${PSK_KEY_BYTES_MAX}`);
    if (keys.has(name)) throw wrong(`${where}: there is a key of '${name}' already`);
    keys.set(name, Buffer.from(hex, 'hex'));
  });
  if (keys.size === 0) throw wrong(`${path} holds no key: make one with psktool -u NAME -p ${path}`);
  return keys;
}

/** What a server needs to speak TLS. */
export interface ServerTlsSettings {
  readonly mode: Exclude<TlsMode, 'off'>;
  /** Folder with server-cert.pem and server-key.pem; exactly one of this and `pskFile`. */
  readonly certificates?: string;
  readonly pskFile?: string;
  /** Clients need a certificate that ca-cert.pem signed. Of no meaning with keys, which prove who a client is anyway. */
  readonly verifyPeer?: boolean;
  /** Name in the certificate, which clients are told in the URI; default: none, they go by the address. */
  readonly hostname?: string;
}

export interface ServerTlsOptions {
  readonly context: tls.SecureContextOptions;
  readonly verifyPeer: boolean;
  /** Of keys, if it is about keys. */
  readonly keys: ReadonlyMap<string, Buffer> | null;
}

/** Reads and checks a server's credentials. Throws 'usage' for settings that make no sense, 'tls' for files that do not. */
export function loadServerTls(settings: ServerTlsSettings): ServerTlsOptions {
  const { certificates, pskFile } = settings;
  if ((certificates === undefined) === (pskFile === undefined))
    throw new BlockferryError('usage', 'TLS needs either a folder of certificates or a file of keys (PSK)');
  if (pskFile !== undefined) {
    const context = { ...COMMON, ciphers: PSK_CIPHERS };
    contextOf(context, pskFile);
    return { context, verifyPeer: false, keys: readPskFile(pskFile) };
  }
  const folder = certificates!;
  const verifyPeer = settings.verifyPeer === true;
  const context = { ...COMMON, ...readAuthorities(folder, verifyPeer), ...readPair(folder, 'server') };
  contextOf(context, folder);
  return { context, verifyPeer, keys: null };
}

/** libnbd's folders. Source: nbd_set_tls_certificates(3). Undefined: there is none. */
function defaultCertificates(): string | undefined {
  const places =
    process.geteuid?.() === 0
      ? ['/etc/pki/libnbd']
      : [join(homedir(), '.pki/libnbd'), join(homedir(), '.config/pki/libnbd')];
  return places.find((place) => existsSync(place));
}

/** `own` (of a URI) before `other` (of a configuration). Credentials are taken from one of them as a whole. */
export function mergeClientTls(own: ClientTlsSettings, other: ClientTlsSettings): ClientTlsSettings {
  if (own.certificates === undefined && own.pskFile === undefined) return { ...other, ...own };
  const { certificates: _certificates, pskFile: _pskFile, ...rest } = other;
  return { ...rest, ...own };
}

/** What `tls.connect` needs beside the socket. `host`: of the URI, null for a unix socket. Throws 'tls'. */
export function loadClientTls(settings: ClientTlsSettings, host: string | null): tls.ConnectionOptions {
  if (settings.pskFile !== undefined) return clientKey(settings, settings.pskFile);
  const folder = settings.certificates ?? defaultCertificates();
  const credentials: tls.SecureContextOptions =
    folder === undefined
      ? {}
      : {
          ...readAuthorities(folder, settings.certificates !== undefined && settings.verifyPeer !== false),
          ...(existsSync(join(folder, 'client-cert.pem')) ? readPair(folder, 'client') : {}),
        };
  const hostname = settings.hostname ?? host;
  return {
    secureContext: contextOf({ ...COMMON, ...credentials }, folder ?? "Node's authorities"),
    rejectUnauthorized: settings.verifyPeer !== false,
    ...(hostname === null ? { checkServerIdentity: () => undefined } : { host: hostname }),
    ...(hostname === null || isIP(hostname) !== 0 ? {} : { servername: hostname }),
  };
}

function clientKey(settings: ClientTlsSettings, file: string): tls.ConnectionOptions {
  const identity = settings.username ?? userInfo().username;
  const psk = readPskFile(file).get(identity);
  if (psk === undefined)
    throw wrong(`${file} has no key of '${identity}': name another user in the URI, as in nbds://USER@HOST/`);
  return {
    // No authority is trusted: a server that answers with a certificate instead of the key is refused.
    secureContext: contextOf({ ...COMMON, ciphers: PSK_CIPHERS, ca: [] }, file),
    pskCallback: () => ({ psk, identity }),
    checkServerIdentity: () => undefined,
    rejectUnauthorized: true,
  };
}

const WORDS: Readonly<Record<string, string>> = {
  CERT_HAS_EXPIRED: 'its certificate has expired',
  CERT_NOT_YET_VALID: 'its certificate is not valid yet',
  CERT_REVOKED: 'its certificate was revoked',
  DEPTH_ZERO_SELF_SIGNED_CERT: 'its certificate is signed by no authority we trust',
  SELF_SIGNED_CERT_IN_CHAIN: 'its certificate is signed by no authority we trust',
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: 'its certificate is signed by no authority we trust',
  UNABLE_TO_GET_ISSUER_CERT: 'its certificate is signed by no authority we trust',
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: 'its certificate is signed by no authority we trust',
  CERT_SIGNATURE_FAILURE: 'its certificate is signed by no authority we trust',
  INVALID_PURPOSE: 'its certificate is for another purpose',
  ERR_SSL_PEER_DID_NOT_RETURN_A_CERTIFICATE: 'it has no certificate',
  ERR_SSL_TLSV13_ALERT_CERTIFICATE_REQUIRED: 'it wants a certificate of ours: put client-cert.pem there',
  ERR_SSL_SSLV3_ALERT_CERTIFICATE_EXPIRED: 'our certificate has expired, it says',
  ERR_SSL_SSLV3_ALERT_HANDSHAKE_FAILURE: 'it does not accept our credentials',
  ERR_SSL_SSLV3_ALERT_ILLEGAL_PARAMETER: 'it does not accept our key (PSK)',
  ERR_SSL_TLSV1_ALERT_UNKNOWN_PSK_IDENTITY: 'it does not know the name of our key (PSK)',
  ERR_SSL_TLSV1_ALERT_UNKNOWN_CA: 'it does not trust the authority of our certificate',
  ERR_SSL_SSLV3_ALERT_BAD_CERTIFICATE: 'it does not accept our certificate',
  ERR_SSL_UNSUPPORTED_PROTOCOL: 'it speaks no TLS version from 1.2 on',
  ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION: 'it speaks no TLS version from 1.2 on',
  ERR_SSL_NO_SHARED_CIPHER:
    'there is no cipher in common: one side has certificates and the other keys (PSK)?',
  ERR_SSL_NO_SUITABLE_SIGNATURE_ALGORITHM: 'it came without a key (PSK) known here',
  ERR_SSL_WRONG_VERSION_NUMBER: 'what came was no TLS',
  ERR_SSL_PACKET_LENGTH_TOO_LONG: 'what came was no TLS',
  ERR_SSL_DECRYPT_ERROR: 'the keys (PSK) differ',
  ERR_SSL_BINDER_DOES_NOT_VERIFY: 'the keys (PSK) differ',
  ERR_SSL_TLSV1_ALERT_DECRYPT_ERROR: 'it does not accept our key (PSK) or certificate',
  ECONNRESET: 'the peer hung up',
};

/** True for what TLS itself complains about, as opposed to the connection below it. */
export function isTlsError(error: Error): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code !== undefined && code !== 'ECONNRESET' && (code in WORDS || /^ERR_(SSL|TLS)_/.test(code));
}

/** Why TLS failed, in words of one line. */
export function describeTlsError(error: Error): string {
  const { code } = error as NodeJS.ErrnoException;
  const known = code === undefined ? undefined : WORDS[code];
  if (known !== undefined) return known;
  // OpenSSL's own line: ID:error:NUMBER:LIBRARY:FUNCTION:REASON:FILE:LINE:...
  const reason = /:error:[^:]*:[^:]*:[^:]*:([^:]+):/.exec(error.message)?.[1];
  return reason ?? error.message.split('\n')[0]!;
}
