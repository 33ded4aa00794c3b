import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { parseConfig, readConfig } from '../../../src/host/config.js';

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
    assert.equal(parseConfig('name: x', '/').link, '127.0.0.1:0');
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
