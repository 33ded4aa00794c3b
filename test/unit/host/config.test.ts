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
