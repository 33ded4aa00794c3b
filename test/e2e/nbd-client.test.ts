/**
 * The kernel's own NBD client: nbd-client in the test guest attaches an export of ours as /dev/nbd0, with and without TLS, and puts a file
 * system on it. In a guest, so that the module need not be there, nor root's rights, on the machine that runs the tests.
 */

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  cpSync,
  mkdirSync,
  readFileSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { test } from 'node:test';
import { buildGuest } from '../lab/guest.js';
import { DaemonProcess } from '../lab/hosts.js';
import { lacking } from '../lab/programs.js';
import { labMissing, testFolder } from '../lab/vm.js';
import { makePki } from '../support/pki.js';

const skip =
  (await labMissing()) ?? lacking('nbd-client', 'mke2fs', 'e2fsck', 'debugfs', 'ldd', 'cpio', 'setpriv');
const MIB = 1 << 20;
const DISK_BYTES = 32 * MIB;
const GUEST_TIMEOUT_MS = 120_000;

/** The guest's first process. QEMU's user network has the host's loopback at 10.0.2.2. Whatever fails is said, and the rest left. */
const INIT = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /run /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
trap 'echo; echo "GUEST over"; poweroff -f' EXIT
set -e
for module in $(cat /modules/order /modules/more); do insmod /modules/$module; done
for word in $(cat /proc/cmdline); do case $word in bf.port=*) port=\${word#bf.port=};; esac; done
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
/programs/nbd-client 10.0.2.2 $port -N disk $(cat /options) /dev/nbd0
echo "GUEST size $(blockdev --getsize64 /dev/nbd0)"
echo "GUEST read $(sha256sum </dev/nbd0)"
/programs/mke2fs -q -t ext4 -E lazy_itable_init=0 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
mkdir /mnt/folder
for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/folder/$n bs=64k count=16 2>/dev/null & done
wait
cat /mnt/folder/* >/mnt/all
sync
echo "GUEST wrote $(sha256sum </mnt/all)"
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o discard /dev/nbd0 /mnt
echo "GUEST again $(sha256sum </mnt/all)"
rm -r /mnt/folder
umount /mnt
blockdev --flushbufs /dev/nbd0
/programs/nbd-client -d /dev/nbd0
echo "GUEST detached"
`;

/** An initramfs that the kernel lays over the guest's own: nbd-client and mke2fs with their libraries, more modules, another first process. */
function overlay(folder: string, modules: readonly string[], options: string, certificates?: string): string {
  const root = join(folder, 'root');
  const copy = (from: string, to = from): void => {
    mkdirSync(dirname(join(root, to)), { recursive: true });
    copyFileSync(from, join(root, to));
  };
  for (const name of ['nbd-client', 'mke2fs']) {
    const program = execFileSync('which', [name], { encoding: 'utf8' }).trim();
    copy(program, `/programs/${name}`);
    const libraries = execFileSync('ldd', [program], { encoding: 'utf8' }).matchAll(/(\/\S+) \(0x/g);
    for (const [, library] of libraries) copy(library!);
  }
  for (const module of modules) copy(module, `/modules/${basename(module)}`);
  writeFileSync(join(root, 'modules/more'), `${modules.map((module) => basename(module)).join('\n')}\n`);
  writeFileSync(join(root, 'options'), options);
  writeFileSync(join(root, 'init'), INIT);
  chmodSync(join(root, 'init'), 0o755);
  if (certificates !== undefined) cpSync(certificates, join(root, 'pki'), { recursive: true });
  const archive = join(folder, 'overlay');
  const pack = 'find . -print | sort | cpio --quiet -o -H newc -R 0:0 -F "$1"';
  execFileSync('sh', ['-c', pack, 'sh', archive], { cwd: root });
  return archive;
}

/** Runs the guest to its end; what it said. */
async function boot(kernel: string, initrd: string, port: string): Promise<string> {
  const words = [
    ...['qemu-system-x86_64', '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-machine', 'q35', '-accel', 'tcg', '-cpu', 'max', '-m', '256', '-serial', 'stdio'],
    ...['-netdev', 'user,id=net', '-device', 'virtio-net-pci,netdev=net,romfile='],
    ...['-kernel', kernel, '-initrd', initrd, '-append', `console=ttyS0 quiet panic=1 bf.port=${port}`],
  ];
  const machine = spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...words], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let said = '';
  for (const stream of [machine.stdout, machine.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
  const timer = setTimeout(() => machine.kill('SIGKILL'), GUEST_TIMEOUT_MS);
  const [code] = await once(machine, 'close');
  clearTimeout(timer);
  assert.equal(code, 0, `the guest did not end: ${said}`);
  return said;
}

const sha256 = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

for (const tls of [false, true])
  test(`nbd-client in a guest: reads, a file system, detaching${tls ? ', over TLS' : ', four connections'}`, {
    skip,
  }, async (t) => {
    const folder = await testFolder();
    t.after(folder.remove);
    const image = join(folder.path, 'disk.img');
    const content = Buffer.concat([randomBytes(DISK_BYTES / 4), Buffer.alloc((3 * DISK_BYTES) / 4)]);
    writeFileSync(image, content.subarray(0, DISK_BYTES / 4));
    truncateSync(image, DISK_BYTES);
    const pki = tls ? makePki() : null;
    t.after(() => pki?.remove());
    const credentials =
      pki === null ? [] : ['--tls', 'required', '--tls-certificates', pki.good, '--tls-verify-peer'];
    const files = '-cacertfile /pki/ca-cert.pem -certfile /pki/client-cert.pem -keyfile /pki/client-key.pem';
    const options = pki === null ? '-C 4' : `-tlshostname localhost ${files}`;

    const state = join(folder.path, 'state');
    const listen = ['--listen', '127.0.0.1:0', '--state-dir', state];
    const daemon = await DaemonProcess.start(['serve', image, '--name', 'disk', ...listen, ...credentials]);
    t.after(() => daemon.kill());
    const port = new URL(daemon.uris[0]!).port;
    const guest = await buildGuest();
    const initrd = join(folder.path, 'initrd');
    copyFileSync(guest.initrd, initrd);
    appendFileSync(initrd, readFileSync(overlay(folder.path, guest.modules, options, pki?.good)));

    const said = await boot(guest.kernel, initrd, port);
    const told = (what: string): string | undefined =>
      new RegExp(`^GUEST ${what} (\\S+)`, 'm').exec(said)?.[1];
    assert.equal(told('size'), String(DISK_BYTES), said);
    assert.equal(told('read'), sha256(content), said);
    assert.match(told('wrote') ?? said, /^[0-9a-f]{64}$/);
    assert.equal(told('again'), told('wrote'));
    assert.match(said, /^GUEST detached/m, said);
    assert.equal(await daemon.stop(), 0, daemon.stderr);

    // What the guest wrote is a sound file system here, with the same file in it.
    execFileSync('e2fsck', ['-fn', image], { stdio: 'pipe' });
    const all = execFileSync('debugfs', ['-R', 'cat /all', image], { maxBuffer: DISK_BYTES, stdio: 'pipe' });
    assert.equal(all.length, 8 * MIB);
    assert.equal(sha256(all), told('wrote'));
  });
