/** Credentials: what is loaded, and what is said about files that cannot be. */
import assert from 'node:assert/strict';
import { copyFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { BlockferryError, type ErrorCode } from '../../../src/errors.js';
import {
  describeTlsError,
  isTlsError,
  loadClientTls,
  loadServerTls,
  mergeClientTls,
  readPskFile,
  TLS_FILE_BYTES_MAX,
} from '../../../src/nbd/tls.js';
import { makePki, type Pki } from '../../support/pki.js';

let pki: Pki;
before(() => {
  pki = makePki();
});
after(() => pki.remove());

function fails(action: () => unknown, why: RegExp, code: ErrorCode = 'tls'): void {
  assert.throws(action, (error) => {
    assert.ok(error instanceof BlockferryError, String(error));
    assert.equal(error.code, code);
    assert.match(error.message, why);
    assert.ok(!error.message.includes('\n'));
    return true;
  });
}

/** A copy of the good folder with one file replaced. */
function spoilt(name: string, file: string, content: string | { from: string }): string {
  const folder = join(pki.root, name);
  mkdirSync(folder);
  for (const kept of [
    'ca-cert.pem',
    'server-cert.pem',
    'server-key.pem',
    'client-cert.pem',
    'client-key.pem',
  ])
    copyFileSync(join(pki.good, kept), join(folder, kept));
  if (typeof content === 'string') writeFileSync(join(folder, file), content);
  else copyFileSync(content.from, join(folder, file));
  return folder;
}

describe("a server's credentials", () => {
  test('are a folder of certificates or a file of keys', () => {
    assert.equal(
      loadServerTls({ mode: 'required', certificates: pki.good, verifyPeer: true }).verifyPeer,
      true,
    );
    assert.equal(loadServerTls({ mode: 'allowed', certificates: pki.good }).verifyPeer, false);
    assert.deepEqual(
      [...loadServerTls({ mode: 'required', pskFile: pki.keys }).keys!.keys()],
      ['alice', 'bob'],
    );
  });
  test('neither and both are wrong usage', () => {
    fails(() => loadServerTls({ mode: 'required' }), /either/, 'usage');
    const both = { mode: 'required', certificates: pki.good, pskFile: pki.keys } as const;
    fails(() => loadServerTls(both), /either/, 'usage');
  });
  test('say TLS 1.2 at least', () => {
    assert.equal(loadServerTls({ mode: 'required', certificates: pki.good }).context.minVersion, 'TLSv1.2');
    assert.equal(loadServerTls({ mode: 'required', pskFile: pki.keys }).context.minVersion, 'TLSv1.2');
  });
  test('files that are not there, or not what they should be', () => {
    const load = (certificates: string) => () =>
      loadServerTls({ mode: 'required', certificates, verifyPeer: true });
    fails(load(join(pki.root, 'nowhere')), /cannot read .*ca-cert\.pem: ENOENT/);
    fails(load(spoilt('no-cert', 'server-cert.pem', 'x')), /server-cert\.pem holds no PEM certificate/);
    fails(load(spoilt('no-key', 'server-key.pem', 'x')), /server-key\.pem holds no PEM key/);
    fails(load(spoilt('no-ca', 'ca-cert.pem', 'x')), /ca-cert\.pem holds no PEM certificate/);
    fails(load(spoilt('no-crl', 'ca-crl.pem', 'x')), /cannot be used/);
    const foreign = { from: join(pki.stranger, 'server-key.pem') };
    fails(
      load(spoilt('two', 'server-key.pem', foreign)),
      /server-key\.pem is not the key of .*server-cert\.pem/,
    );
    fails(load(spoilt('big', 'server-key.pem', ' '.repeat(TLS_FILE_BYTES_MAX + 1))), /larger than 1 MiB/);
    fails(load(pki.expired), /server-cert\.pem has expired .*renew/);
  });
  test('without --tls-verify-peer no authority is needed', () => {
    const folder = join(pki.root, 'alone');
    mkdirSync(folder);
    for (const file of ['server-cert.pem', 'server-key.pem'])
      copyFileSync(join(pki.good, file), join(folder, file));
    assert.ok(loadServerTls({ mode: 'required', certificates: folder }));
    fails(() => loadServerTls({ mode: 'required', certificates: folder, verifyPeer: true }), /ca-cert\.pem/);
  });
});

describe('a file of keys', () => {
  const file = (content: string): string => {
    const path = join(pki.root, 'some.psk');
    writeFileSync(path, content);
    return path;
  };
  test('is read line by line', () => {
    const keys = readPskFile(file('a b:00ff\n\nc@d:AB\r\n'));
    assert.deepEqual(
      [...keys],
      [
        ['a b', Buffer.of(0, 255)],
        ['c@d', Buffer.of(0xab)],
      ],
    );
  });
  for (const [what, content, why] of [
    ['is empty', '\n', /no key/],
    ['has a line without a name', ':00', /line 1 is not NAME:HEXKEY/],
    ['has a key that is not hexadecimal', 'a:00\nb:xx', /line 2 is not NAME:HEXKEY/],
    ['has half a byte', 'a:000', /line 1/],
    ['has no key in a line', 'a:', /line 1/],
    ['names someone twice', 'a:00\na:01', /line 2: there is a key of 'a' already/],
    ['has a name too long', `${'a'.repeat(257)}:00`, /256 bytes at most/],
    ['has a key too long', `a:${'00'.repeat(513)}`, /a key 512/],
  ] as const)
    test(`that ${what} is refused`, () => fails(() => readPskFile(file(content)), why));
});

describe("a client's credentials", () => {
  test('certificates, with a name to expect or without', () => {
    const tcp = loadClientTls({ certificates: pki.good }, 'localhost');
    assert.deepEqual([tcp.host, tcp.servername, tcp.rejectUnauthorized], ['localhost', 'localhost', true]);
    const address = loadClientTls({ certificates: pki.good }, '127.0.0.1');
    assert.deepEqual([address.host, address.servername], ['127.0.0.1', undefined]);
    const told = loadClientTls({ certificates: pki.good, hostname: 'disks.example' }, '127.0.0.1');
    assert.deepEqual([told.host, told.servername], ['disks.example', 'disks.example']);
    const unix = loadClientTls({ certificates: pki.good, verifyPeer: false }, null);
    assert.deepEqual([unix.host, unix.rejectUnauthorized], [undefined, false]);
  });
  test('a key of the file, by the name in the URI', () => {
    const { pskCallback } = loadClientTls({ pskFile: pki.keys, username: 'bob' }, 'localhost');
    assert.equal(pskCallback!(null)!.identity, 'bob');
    fails(
      () => loadClientTls({ pskFile: pki.keys, username: 'carol' }, 'localhost'),
      /has no key of 'carol': .*nbds:\/\/USER@HOST/,
    );
  });
  test('files that are of no use', () => {
    fails(() => loadClientTls({ certificates: join(pki.root, 'nowhere') }, 'h'), /ca-cert\.pem: ENOENT/);
    fails(() => loadClientTls({ certificates: pki.expired }, 'h'), /client-cert\.pem has expired/);
  });
  test("a URI's come before a configuration's, as a whole", () => {
    const defaults = { certificates: '/a', username: 'x' };
    assert.deepEqual(mergeClientTls({}, defaults), defaults);
    assert.deepEqual(mergeClientTls({ username: 'y', hostname: 'h' }, defaults), {
      ...defaults,
      username: 'y',
      hostname: 'h',
    });
    assert.deepEqual(mergeClientTls({ pskFile: '/k' }, defaults), { pskFile: '/k', username: 'x' });
  });
});

test("OpenSSL's errors are told in one line of words", () => {
  const error = (code: string, message: string) => Object.assign(new Error(message), { code });
  const long = 'C0:error:0A0000C7:SSL routines:some_function:no such thing:../a.c:3517:\n';
  assert.equal(describeTlsError(error('ERR_SSL_NO_SUCH_THING', long)), 'no such thing');
  assert.equal(describeTlsError(error('CERT_HAS_EXPIRED', 'x')), 'its certificate has expired');
  assert.ok(isTlsError(error('ERR_SSL_NO_SUCH_THING', long)));
  assert.ok(!isTlsError(error('ECONNRESET', 'x')));
  assert.ok(!isTlsError(error('ECONNREFUSED', 'x')));
});
