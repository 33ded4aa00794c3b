/**
 * Builds the test guest: Debian's cloud kernel, downloaded and unpacked but never installed, and an initramfs of busybox, the
 * disk's kernel modules and the workload (test/lab/guest). The result is kept in the user's cache folder, under a hash of all
 * that went into it.
 */

import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { chmod, copyFile, mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { cached, compiled, repositoryRoot } from './cache.js';

const run = promisify(execFile);

const sources = join(repositoryRoot, 'test/lab/guest');

const KERNEL_META_PACKAGE = 'linux-image-cloud-amd64';
const BUSYBOX = ['/bin/busybox', '/usr/bin/busybox'];
/** In the order of insertion; ext4 is built in. */
const MODULES = [
  'drivers/virtio/virtio_ring.ko',
  'drivers/virtio/virtio.ko',
  'drivers/virtio/virtio_pci_legacy_dev.ko',
  'drivers/virtio/virtio_pci_modern_dev.ko',
  'drivers/virtio/virtio_pci.ko',
  'drivers/block/virtio_blk.ko',
];
/** Likewise, for guests that have more than the disk: they are not in the initramfs but beside it. */
const MORE_MODULES = [
  'net/core/failover.ko',
  'drivers/net/net_failover.ko',
  'drivers/net/virtio_net.ko',
  'drivers/block/nbd.ko',
];
const DOWNLOAD_TIMEOUT_MS = 120_000;

export interface Guest {
  kernel: string;
  initrd: string;
  /** Further modules, for network and nbd, in the order of insertion. */
  modules: string[];
}

/** What is missing on this machine to build or boot the guest, in one line; null if nothing is. */
export async function guestMissing(): Promise<string | null> {
  if (process.arch !== 'x64') return 'the test guest is built for x86-64 machines';
  if (!BUSYBOX.some((path) => existsSync(path))) return 'busybox-static is not installed';
  for (const tool of ['gcc', 'cpio', 'dpkg', 'apt-get']) {
    const found = await run('sh', ['-c', `command -v ${tool}`]).catch(() => null);
    if (found === null) return `${tool} is not installed`;
  }
  return kernelPackage().then(
    () => null,
    (error: Error) => error.message,
  );
}

/** The package the meta package stands for at this moment: its name changes with every kernel update. */
async function kernelPackage(): Promise<string> {
  const answer = await run('apt-cache', ['depends', KERNEL_META_PACKAGE]).catch(() => ({ stdout: '' }));
  const name = /Depends: (linux-image-\S+)/.exec(answer.stdout)?.[1];
  if (name === undefined) throw new Error(`apt knows no ${KERNEL_META_PACKAGE}: run apt-get update`);
  return name;
}

/** The guest, from the cache or built now (a few seconds). Several processes may ask at once. */
export async function buildGuest(): Promise<Guest> {
  const kernel = await kernelPackage();
  const busybox = BUSYBOX.find((path) => existsSync(path));
  if (busybox === undefined)
    throw new Error('the test guest needs busybox-static: apt-get install busybox-static');
  const workload = await compiled(join(sources, 'workload.c'), ['-static', '-s', '-lpthread']);
  const init = join(sources, 'init');
  const folder = await cached(
    'guest',
    [
      kernel,
      MODULES.join(),
      MORE_MODULES.join(),
      await readFile(workload),
      await readFile(init),
      await readFile(busybox),
      await readFile(fileURLToPath(import.meta.url)),
    ],
    (ready, work) => buildInto(ready, work, { kernel, busybox, workload, init }),
  );
  return {
    kernel: join(folder, 'vmlinuz'),
    initrd: join(folder, 'initrd'),
    modules: MORE_MODULES.map((module) => join(folder, moduleName(module))),
  };
}

interface Parts {
  kernel: string;
  busybox: string;
  workload: string;
  init: string;
}

async function buildInto(
  ready: string,
  work: string,
  { kernel, busybox, workload, init }: Parts,
): Promise<void> {
  await run('apt-get', ['download', kernel], { cwd: work, timeout: DOWNLOAD_TIMEOUT_MS });
  const archive = (await readdir(work)).find((name) => name.endsWith('.deb'));
  if (archive === undefined) throw new Error(`apt-get download ${kernel} left no package`);
  await run('dpkg', ['-x', archive, 'package'], { cwd: work });

  const root = join(work, 'root');
  await mkdir(join(root, 'bin'), { recursive: true });
  await mkdir(join(root, 'modules'));
  await copyFile(busybox, join(root, 'bin/busybox'));
  await copyFile(workload, join(root, 'workload'));
  await copyFile(init, join(root, 'init'));
  await chmod(join(root, 'init'), 0o755);
  const version = (await readdir(join(work, 'package/lib/modules')))[0]!;
  const tree = join(work, 'package/lib/modules', version, 'kernel');
  for (const module of MODULES)
    await copyModule(join(tree, module), join(root, 'modules', moduleName(module)));
  for (const module of MORE_MODULES) await copyModule(join(tree, module), join(ready, moduleName(module)));
  await writeFile(join(root, 'modules/order'), `${MODULES.map(moduleName).join('\n')}\n`);

  const list = 'find . -print | sort | cpio --quiet -o -H newc -R 0:0 -F "$1"';
  await run('sh', ['-c', list, 'sh', join(ready, 'initrd')], { cwd: root });
  await copyFile(join(work, 'package/boot', `vmlinuz-${version}`), join(ready, 'vmlinuz'));
}

/** Newer kernels come with compressed modules. */
async function copyModule(from: string, to: string): Promise<void> {
  if (existsSync(from)) return copyFile(from, to);
  await run('sh', ['-c', 'xz -dc "$1.xz" > "$2"', 'sh', from, to]).catch((error: Error) => {
    throw new Error(`the kernel package has no ${from}: ${error.message}`);
  });
}

function moduleName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}
