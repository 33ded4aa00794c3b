import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import {
  activatedAddresses,
  DEFAULT_LISTEN_ADDRESS,
  exportUri,
  formatListenAddress,
  type ListenAddress,
  parseListenAddress,
} from '../../../src/nbd/address.js';

function isAddressError(error: unknown): boolean {
  return error instanceof BlockferryError && error.code === 'address' && !error.message.includes('\n');
}

describe('ADDR', () => {
  const understood: [string, ListenAddress][] = [
    ['unix:/run/b.sock', { kind: 'unix', path: '/run/b.sock' }],
    ['unix:b:1', { kind: 'unix', path: 'b:1' }],
    ['127.0.0.1:10809', { kind: 'tcp', host: '127.0.0.1', port: 10_809 }],
    ['localhost:0', { kind: 'tcp', host: 'localhost', port: 0 }],
    ['host-1.example.net:65535', { kind: 'tcp', host: 'host-1.example.net', port: 65_535 }],
    ['[::1]:10809', { kind: 'tcp', host: '::1', port: 10_809 }],
    ['[::]:1', { kind: 'tcp', host: '::', port: 1 }],
    ['fd:3', { kind: 'fd', fd: 3 }],
    ['stdio', { kind: 'stdio' }],
  ];
  for (const [text, address] of understood)
    test(`${text} is understood, and written the same way`, () => {
      assert.deepEqual(parseListenAddress(text), address);
      assert.equal(formatListenAddress(address), text);
    });

  const refused = [
    '',
    'localhost',
    ':10809',
    'localhost:',
    'localhost:65536',
    'localhost:-1',
    'localhost:1e3',
    'localhost: 1',
    'local host:1',
    '::1:10809',
    '[::1]',
    '[::1]:',
    '[127.0.0.1]:1',
    '[]:1',
    'unix:',
    'unix:a\0b',
    `unix:/${'x'.repeat(107)}`,
    'fd:',
    'fd:-1',
    'fd:x',
    'fd:99999999999',
    'stdio:',
  ];
  for (const text of refused)
    test(`${JSON.stringify(text.slice(0, 20))} is refused`, () => {
      assert.throws(() => parseListenAddress(text), isAddressError);
    });

  test('the default is the local machine, port 10809', () => {
    assert.equal(formatListenAddress(DEFAULT_LISTEN_ADDRESS), '127.0.0.1:10809');
  });
});

describe('NBD URIs', () => {
  const cases: [string, string, string | undefined][] = [
    ['127.0.0.1:10809', 'disk', 'nbd://127.0.0.1:10809/disk'],
    ['127.0.0.1:10809', '', 'nbd://127.0.0.1:10809/'],
    ['[::1]:7', 'a b/c?d', 'nbd://[::1]:7/a%20b%2Fc%3Fd'],
    ['unix:/run/b.sock', 'disk', 'nbd+unix:///disk?socket=/run/b.sock'],
    ['unix:/tmp/a b&c', '', 'nbd+unix:///?socket=/tmp/a%20b%26c'],
    ['fd:3', 'disk', undefined],
    ['stdio', 'disk', undefined],
  ];
  for (const [address, name, uri] of cases)
    test(`${address}, export ${JSON.stringify(name)}`, () => {
      assert.equal(exportUri(parseListenAddress(address), name), uri);
    });
});

test('the URI of an export with TLS', () => {
  const uri = (address: string, hostname?: string) =>
    exportUri(parseListenAddress(address), 'a b', { hostname });
  assert.equal(uri('[::1]:7'), 'nbds://[::1]:7/a%20b');
  assert.equal(uri('[::1]:7', 'h.example'), 'nbds://[::1]:7/a%20b?tls-hostname=h.example');
  assert.equal(uri('unix:/s'), 'nbds+unix:///a%20b?socket=/s');
  assert.equal(uri('unix:/s', 'h.example'), 'nbds+unix:///a%20b?socket=/s&tls-hostname=h.example');
  assert.equal(uri('stdio', 'h.example'), undefined);
});

describe('socket activation', () => {
  test('descriptors from 3 on, and the variables are taken away', () => {
    const env: NodeJS.ProcessEnv = { LISTEN_PID: '42', LISTEN_FDS: '2', LISTEN_FDNAMES: 'a:b', HOME: '/' };
    assert.deepEqual(activatedAddresses(env, 42), [
      { kind: 'fd', fd: 3 },
      { kind: 'fd', fd: 4 },
    ]);
    assert.deepEqual(env, { HOME: '/' });
  });

  test('variables meant for another process are left alone', () => {
    const env: NodeJS.ProcessEnv = { LISTEN_PID: '42', LISTEN_FDS: '2' };
    assert.deepEqual(activatedAddresses(env, 43), []);
    assert.equal(env.LISTEN_FDS, '2');
    assert.deepEqual(activatedAddresses({}, 42), []);
    assert.deepEqual(activatedAddresses({ LISTEN_PID: '42' }, 42), []);
  });

  for (const count of ['-1', 'x', '', '65'])
    test(`LISTEN_FDS=${JSON.stringify(count)} is refused`, () => {
      assert.throws(() => activatedAddresses({ LISTEN_PID: '1', LISTEN_FDS: count }, 1), isAddressError);
    });
});
