// `start`, `stop` and `status` of a machine, with a stand-in for QEMU; the moves of real ones are in test/e2e.
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { writeFakeQemu } from '../fakes/fake-qemu.js';
import { LabHost, runBlockferry } from '../lab/hosts.js';
import { inFolder, refused } from './bad-input/refusals.js';

test('a machine is started and stopped by hand', () =>
  inFolder(async (folder) => {
    const image = join(folder, 'disk.img');
    writeFileSync(image, Buffer.alloc(1 << 20));
    const vm = {
      name: 'vm1',
      binary: writeFakeQemu(folder),
      args: ['-fake', 'well'],
      disks: [{ node: 'disk0', volume: 'disk' }],
      serial: false,
    };
    const broken = {
      ...vm,
      name: 'vm2',
      binary: '/nowhere/qemu',
      disks: [{ node: 'disk0', volume: 'other' }],
    };
    const volumes = [{ name: 'disk', image }];
    const host = await LabHost.start({ folder, name: 'a', volumes, vms: [vm, broken] });
    try {
      const at = ['--control', host.control];
      const run = async (...words: string[]): Promise<string> => {
        const { code, stdout, stderr } = await runBlockferry([...words, ...at]);
        assert.equal(code, 0, stderr);
        return stdout;
      };
      assert.match(await run('status'), /^ {2}vm1 +stopped +disk$/m);
      assert.match(await run('start', 'vm1'), /^vm1: running, process \d+$/m);
      assert.match(await run('status'), /^ {2}vm1 +running +\d+ +disk$/m);
      await refused(['start', 'vm1', ...at], 1, /machine "vm1" has a process already \(\d+\)/);
      await refused(['start', 'vm2', ...at], 1, /volume "other"|cannot run \/nowhere\/qemu/);
      await refused(['start', 'vm3', ...at], 1, /no daemon here has a machine "vm3"/);
      await refused(['stop', 'vm1', '--wait', 'long', ...at], 2, /write seconds/);
      assert.equal(await run('stop', 'vm1', '--now'), 'vm1: stopped\n');
      assert.match(await run('status'), /^ {2}vm1 +stopped/m);
    } finally {
      assert.equal(await host.stop(), 0, host.daemon.stderr);
    }
  }));
