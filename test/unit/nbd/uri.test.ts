import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { formatNbdUri, type NbdUri, parseNbdUri } from '../../../src/nbd/uri.js';

const tcp = (host: string, port: number, exportName = ''): NbdUri => ({
  address: { kind: 'tcp', host, port },
  exportName,
});
const unix = (path: string, exportName = ''): NbdUri => ({ address: { kind: 'unix', path }, exportName });

const GOOD: [text: string, value: NbdUri, formatted?: string][] = [
  ['nbd://example.com', tcp('example.com', 10809)],
  ['nbd://example.com/', tcp('example.com', 10809), 'nbd://example.com'],
  ['nbd://example.com/disk', tcp('example.com', 10809, 'disk')],
  ['nbd://example.com:10809/disk', tcp('example.com', 10809, 'disk'), 'nbd://example.com/disk'],
  ['nbd://example.com:/disk', tcp('example.com', 10809, 'disk'), 'nbd://example.com/disk'],
  ['nbd://example.com:1/disk', tcp('example.com', 1, 'disk')],
  ['nbd://example.com//disk', tcp('example.com', 10809, '/disk')],
  ['nbd://example.com/a/../b', tcp('example.com', 10809, 'a/../b')],
  ['nbd://example.com/hello%20world', tcp('example.com', 10809, 'hello world')],
  ['nbd://example.com/a%2Fb', tcp('example.com', 10809, 'a/b'), 'nbd://example.com/a/b'],
  ['nbd://example.com/a+b', tcp('example.com', 10809, 'a+b'), 'nbd://example.com/a%2Bb'],
  ['nbd://example.com/%C3%A9%3F%23%25', tcp('example.com', 10809, 'é?#%')],
  ['NBD://example.com/Disk', tcp('example.com', 10809, 'Disk'), 'nbd://example.com/Disk'],
  ['nbd://127.0.0.1:65535', tcp('127.0.0.1', 65535)],
  ['nbd://[::1]:10810/x', tcp('::1', 10810, 'x')],
  ['nbd://[fe80::1%25eth0]/x', tcp('fe80::1%eth0', 10809, 'x')],
  ['nbd:///x', tcp('localhost', 10809, 'x'), 'nbd://localhost/x'],
  ['nbd://h?x-note=1', tcp('h', 10809), 'nbd://h'],
  ['nbd+unix:///?socket=/run/a.sock', unix('/run/a.sock')],
  ['nbd+unix://?socket=/run/a.sock', unix('/run/a.sock'), 'nbd+unix:///?socket=/run/a.sock'],
  ['nbd+unix:///disk?socket=nbd.sock', unix('nbd.sock', 'disk')],
  [
    'nbd+unix:////disk?socket=%2Ftmp%2Fa%20%26b%3D1',
    unix('/tmp/a &b=1', '/disk'),
    'nbd+unix:////disk?socket=/tmp/a%20%26b%3D1',
  ],
  ['nbd+unix:///?socket=/a+b', unix('/a+b'), 'nbd+unix:///?socket=/a%2Bb'],
  ['nbd+unix:///?socket=%00/abstract', unix('\0/abstract')],
  ['nbds://h/x', { ...tcp('h', 10809, 'x'), tls: {} }],
  ['NBDS://@h/x', { ...tcp('h', 10809, 'x'), tls: {} }, 'nbds://h/x'],
  ['nbds://alice@h:1/x', { ...tcp('h', 1, 'x'), tls: { username: 'alice' } }],
  ['nbds://a%40b%3Ac@[::1]', { ...tcp('::1', 10809), tls: { username: 'a@b:c' } }],
  [
    'nbds://h/x?tls-certificates=/etc/pki%20a&tls-hostname=disks.example&tls-verify-peer=false',
    {
      ...tcp('h', 10809, 'x'),
      tls: { certificates: '/etc/pki a', hostname: 'disks.example', verifyPeer: false },
    },
  ],
  [
    'nbds+unix://alice@/x?socket=/s&tls-psk-file=/k&tls-verify-peer=1',
    { ...unix('/s', 'x'), tls: { username: 'alice', pskFile: '/k', verifyPeer: true } },
    'nbds+unix://alice@/x?socket=/s&tls-psk-file=/k&tls-verify-peer=true',
  ],
];

const BAD: [text: string, why: RegExp][] = [
  ['', /looks like/],
  ['example.com', /looks like/],
  ['unix:/run/a.sock', /looks like/],
  ['nbd:example.com', /looks like/],
  ['nbd:unix:/run/a.sock', /looks like/],
  ['nbd://h/x#fragment', /looks like/],
  ['http://h/x', /scheme 'http'/],
  ['nbd+ssh://h/x', /scheme 'nbd\+ssh'/],
  ['nbd://alice@h/x', /TLS: write nbds/],
  ['nbd+unix://alice@/x?socket=/s', /TLS: write nbds/],
  ['nbd://h/x?tls-psk-file=/k', /'tls-psk-file' is for TLS: write nbds/],
  ['nbds://h/x?tls-type=psk', /'tls-type' is not known/],
  ['nbds://alice:secret@h/x', /password/],
  ['nbds://h/x?tls-certificates=', /'tls-certificates' must say something/],
  ['nbds://h/x?tls-certificates=/a&tls-psk-file=/b', /rule each other out/],
  ['nbds://h/x?tls-verify-peer=perhaps', /true or false/],
  ['nbds+unix://h/x?socket=/s', /no host/],
  ['nbds+unix:///x', /socket=PATH/],
  ['nbd://h:0/x', /port/],
  ['nbd://h:65536/x', /port/],
  ['nbd://h:12a/x', /HOST/],
  ['nbd://::1/x', /HOST/],
  ['nbd://[::1/x', /HOST/],
  ['nbd://[example.com]/x', /IPv6/],
  ['nbd://h/%zz', /percent/],
  ['nbd://h/%ff', /percent/],
  ['nbd://h/a%00b', /NUL/],
  [`nbd://h/${'x'.repeat(4097)}`, /4096/],
  ['nbd://h/x?socket=/s', /nbd\+unix/],
  ['nbd://h/x?colour=red', /'colour' is not known/],
  ['nbd+unix:///x', /socket=PATH/],
  ['nbd+unix:///x?socket=', /socket=PATH/],
  ['nbd+unix:///x?socket=/a&socket=/b', /twice/],
  ['nbd+unix://h/x?socket=/a', /no host/],
  ['nbd+unix:///x?socket=/a%00b', /NUL/],
  [`nbd+unix:///x?socket=/${'s'.repeat(107)}`, /107/],
];

describe('NBD URI', () => {
  for (const [text, value, formatted] of GOOD) {
    it(`reads ${text}`, () => {
      assert.deepEqual(parseNbdUri(text), value);
      assert.equal(formatNbdUri(value), formatted ?? text);
      assert.deepEqual(parseNbdUri(formatNbdUri(value)), value);
    });
  }
  for (const [text, why] of BAD) {
    it(`refuses ${text.slice(0, 60)}`, () => {
      assert.throws(
        () => parseNbdUri(text),
        (error) =>
          error instanceof BlockferryError &&
          error.code === 'address' &&
          why.test(error.message) &&
          !error.message.includes('\n'),
      );
    });
  }
});
