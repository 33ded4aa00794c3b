import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { guestPolicyOf, linkPolicyOf, parseConfig, readConfig } from '../../../src/host/config.js';
import { CONNECTIONS_MAX, HANDSHAKE_TIMEOUT_MS, HANDSHAKES_MAX } from '../../../src/nbd/constants.js';
import { parseAccessRule } from '../../../src/nbd/server/access.js';

const GOOD = `
name: a
stateDir: /var/state
link: 10.0.0.1:10809
volumes:
  - {name: disk, image: images/disk.img}
vms:
  - name: vm1
    args: [-m, "256", -device, "virtio-blk-pci,drive=disk0"]
    disks: [{volume: disk, node: disk0}]
    autostart: true
`;

function refused(text: string, pattern: RegExp): void {
  assert.throws(() => parseConfig(text, '/etc', 'host.yaml'), { code: 'usage', message: pattern });
}

describe('configuration', () => {
  test('is completed with defaults and absolute paths', () => {
    const config = parseConfig(GOOD, '/etc/blockferry');
    assert.equal(config.control, '/var/state/control/a.sock');
    assert.equal(config.images, '/var/state/images');
    assert.equal(config.run, '/var/state/run');
    assert.equal(config.migrationAddress, '127.0.0.1');
    assert.equal(config.stopTimeoutMs, 30_000);
    assert.deepEqual(config.volumes, [{ name: 'disk', image: '/etc/blockferry/images/disk.img' }]);
    assert.equal(config.vms[0].autostart, true);
    assert.deepEqual(Object.keys(config.vms[0].definition).sort(), [
      'args',
      'binary',
      'disks',
      'name',
      'serial',
    ]);
    assert.equal(config.orderFrom, null);
    assert.equal(
      parseConfig('name: a\norderFrom: template.record', '/etc').orderFrom,
      '/etc/template.record',
    );
    assert.equal(parseConfig('name: x', '/').link, '127.0.0.1:0');
    assert.deepEqual(config.seeds, []);
    assert.deepEqual(parseConfig('name: x\nseeds: [a.img, /b.img]', '/etc').seeds, ['/etc/a.img', '/b.img']);
  });

  test('says where what is wrong', () => {
    refused('', /name/);
    refused('name: a\nvolumez: []', /volumez/);
    refused('name: a b', /name: a name of letters/);
    refused('name: a\nvolumes: [{name: disk}]', /volumes\[0\]\.image: expected string/);
    refused('name: a\nvolumes: [{name: ../x, image: y}]', /volumes\[0\]\.name: a name of letters/);
    refused('name: a\nvolumes: [{name: daemons, image: y}]', /own folders/);
    refused(
      'name: a\nvms: [{name: v, args: [-m, 256], disks: [{volume: d, node: n}]}]',
      /vms\[0\]\.args\[1\]: expected string/,
    );
    refused(
      'name: a\nvms: [{name: v, args: [], disks: [{volume: d, node: 0n}]}]',
      /vms\[0\]\.disks\[0\]\.node/,
    );
    refused('name: a\nstopTimeoutSeconds: -1', /stopTimeoutSeconds/);
    refused(`name: a\nseeds: [${Array(17).fill('x')}]`, /seeds/);
    refused('[1, 2]', /the file: expected object/);
    refused('name: "a', /no YAML/);
    refused('name: a\nname: b', /no YAML/);
  });

  test('refuses what would give a volume two writers', () => {
    refused('name: a\nvolumes: [{name: d, image: x}, {name: d, image: y}]', /"d" is there twice/);
    const vm = (name: string): string => `{name: ${name}, args: [], disks: [{volume: d, node: n}]}`;
    refused(`name: a\nvms: [${vm('v')}, ${vm('w')}]`, /volume "d" is a disk of "v" and of "w"/);
    refused(`name: a\nvms: [${vm('v')}, ${vm('v')}]`, /"v" is there twice/);
    const twice = '{name: v, args: [], disks: [{volume: d, node: n}, {volume: e, node: n}]}';
    refused(`name: a\nvms: [${twice}]`, /has node "n" twice/);
  });

  test('TLS is off unless it is asked for', () => {
    const config = parseConfig(GOOD, '/etc/blockferry');
    assert.deepEqual([config.linkTls, config.sourceTls, config.tlsOnly.size], [null, null, 0]);
  });

  test('TLS by certificates is required, clients included, unless it says otherwise', () => {
    const config = parseConfig('name: a\ntls: {certificates: pki}', '/etc/blockferry');
    assert.deepEqual(config.linkTls, {
      mode: 'required',
      verifyPeer: true,
      certificates: '/etc/blockferry/pki',
    });
    assert.deepEqual(config.sourceTls, { certificates: '/etc/blockferry/pki' });
  });

  test('TLS by keys, allowed, with a volume that needs it', () => {
    const text = `
name: a
tls: {mode: allowed, psk: /k/keys.psk, username: a, hostname: a.example}
volumes: [{name: d, image: x, tlsOnly: true}, {name: e, image: y}]`;
    const config = parseConfig(text, '/');
    assert.deepEqual(config.linkTls, {
      mode: 'allowed',
      verifyPeer: true,
      pskFile: '/k/keys.psk',
      hostname: 'a.example',
    });
    assert.deepEqual(config.sourceTls, { pskFile: '/k/keys.psk', username: 'a' });
    assert.deepEqual([...config.tlsOnly], ['d']);
  });

  test('transaction logs', () => {
    const volumes =
      'volumes: [{name: a, image: a.img, transactionLog: {file: log/a}}, {name: b, image: b.img,';
    const config = parseConfig(`name: h\n${volumes} transactionLog: {file: /log/b, data: true}}]`, '/etc');
    assert.deepEqual(
      config.volumes.map((volume) => volume.transactionLog),
      [
        { path: '/etc/log/a', data: false },
        { path: '/log/b', data: true },
      ],
    );
    refused('name: h\nvolumes: [{name: a, image: a.img, transactionLog: x}]', /transactionLog/);
    refused(
      'name: h\nvolumes: [{name: a, image: a.img, transactionLog: {data: true}}]',
      /transactionLog\.file/,
    );
  });

  test('TLS towards sources alone', () => {
    const config = parseConfig('name: a\ntls: {mode: off, certificates: /pki}', '/');
    assert.equal(config.linkTls, null);
    assert.deepEqual(config.sourceTls, { certificates: '/pki' });
  });

  test('TLS that makes no sense', () => {
    refused('name: a\ntls: {}', /tls: either certificates or psk/);
    refused('name: a\ntls: {certificates: a, psk: b}', /tls: either certificates or psk/);
    refused('name: a\ntls: {certificates: a, mode: on}', /tls\.mode/);
    refused('name: a\ntls: {certificates: a, colour: red}', /tls: .*colour/);
    refused('name: a\nvolumes: [{name: d, image: x, tlsOnly: true}]', /"d" is tlsOnly, and there is no TLS/);
  });

  test('everybody who gets to the link address may read, unless it says otherwise', () => {
    const config = parseConfig(GOOD, '/etc/blockferry');
    assert.deepEqual([config.access, config.listExports, config.compression], [null, true, 'auto']);
    assert.deepEqual(config.limits, {
      connectionsMax: CONNECTIONS_MAX,
      handshakesMax: HANDSHAKES_MAX,
      handshakeTimeoutMs: HANDSHAKE_TIMEOUT_MS,
    });
    assert.deepEqual(linkPolicyOf(config, 'disk'), { tlsOnly: false });
    assert.deepEqual(guestPolicyOf(config, 'disk'), {});
  });

  test('rules of a volume replace those of the host, which are for all others', () => {
    const text = `
name: a
tls: {certificates: pki, mode: allowed}
access: ['read:address=10.0.0.0/8', 'read:certificate=*']
listExports: false
limits: {connections: 7, handshakes: 8, handshakeSeconds: 1.5}
volumes:
  - {name: d, image: x, access: ['read:certificate=host-b'], connections: 2, tlsOnly: true}
  - {name: e, image: y}
  - {name: nobody, image: z, access: []}`;
    const config = parseConfig(text, '/');
    assert.equal(config.listExports, false);
    assert.deepEqual(config.limits, { connectionsMax: 7, handshakesMax: 8, handshakeTimeoutMs: 1500 });
    const access = ['read:address=10.0.0.0/8', 'read:certificate=*'].map(parseAccessRule);
    assert.deepEqual(linkPolicyOf(config, 'd'), {
      access: [parseAccessRule('read:certificate=host-b')],
      connectionsMax: 2,
      tlsOnly: true,
    });
    for (const name of ['e', 'one that arrives'])
      assert.deepEqual(linkPolicyOf(config, name), { access, tlsOnly: false });
    assert.deepEqual(linkPolicyOf(config, 'nobody'), { access: [], tlsOnly: false });
    assert.deepEqual(guestPolicyOf(config, 'd'), { connectionsMax: 2 });
  });

  test('rules and limits that make no sense', () => {
    refused('name: a\naccess: read', /access: expected array/);
    refused('name: a\naccess: [rw]', /access\[0\]: access rule "rw": write GRADE/);
    refused('name: a\naccess: [read, 7]', /access\[1\]: expected string/);
    refused(
      'name: a\nvolumes: [{name: d, image: x, access: [read, "read:address=10.0.0.1/8"]}]',
      /volumes\[0\]\.access\[1\]: .*write 10\.0\.0\.0\/8/,
    );
    refused(`name: a\naccess: [${'read, '.repeat(300)}]`, /access: .*256/);
    refused('name: a\nlimits: {connections: 0}', /limits\.connections/);
    refused('name: a\nlimits: {handshakes: 1.5}', /limits\.handshakes/);
    refused('name: a\nlimits: {handshakeSeconds: 0}', /limits\.handshakeSeconds/);
    refused('name: a\nlimits: {bytes: 1}', /limits: .*bytes/);
    refused('name: a\nvolumes: [{name: d, image: x, connections: 100000}]', /volumes\[0\]\.connections/);
  });

  test('rules with names that nobody can prove', () => {
    refused(
      'name: a\naccess: ["read:certificate=b"]',
      /access: .*needs tls\.certificates and tls\.verifyPeer/,
    );
    refused(
      'name: a\ntls: {certificates: pki, verifyPeer: false}\nvolumes: [{name: d, image: x, access: ["read:certificate=b"]}]',
      /volumes\[0\]\.access: .*needs tls\.certificates and tls\.verifyPeer/,
    );
    refused('name: a\ntls: {certificates: pki}\naccess: ["read:psk=b"]', /access: .*psk= needs tls\.psk/);
    refused('name: a\ntls: {psk: keys, mode: off}\naccess: ["read:psk=b"]', /needs tls\.psk/);
    parseConfig('name: a\ntls: {psk: keys}\naccess: ["read:psk=b"]', '/');
  });

  test('is not fooled by aliases that multiply', () => {
    const bomb = ['a: &a [x, x, x, x, x, x, x, x, x]'];
    for (let level = 1; level < 9; level += 1) {
      const before = String.fromCharCode(96 + level);
      const name = String.fromCharCode(97 + level);
      bomb.push(`${name}: &${name} [${Array.from({ length: 9 }, () => `*${before}`).join(', ')}]`);
    }
    refused(bomb.join('\n'), /no YAML|Unrecognized/);
  });

  test('that is missing is named', () => {
    assert.throws(() => readConfig('/nonexistent/host.yaml'), {
      code: 'usage',
      message: /nonexistent.*ENOENT/,
    });
  });
});
