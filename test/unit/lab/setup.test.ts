/** bin/lib/setup.sh against stand-ins for apt, dpkg and QEMU: what it runs, what it says, and that it does nothing when all is there. */

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { repositoryRoot } from '../../lab/cache.js';

const MIRROR = 'http://mirror.example.test/debian';
const KEY = '/usr/share/keyrings/debian-archive-keyring.gpg';
const DEB822 = `Types: deb\n# a comment\nURIs: ${MIRROR}\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: ${KEY}\n`;
const VENDOR =
  'deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example.test bookworm main\n';

interface World {
  /** Packages that dpkg calls installed. */
  installed: string[];
  qemu: string | null;
  uid: number;
  /** Packages that apt's lists know. */
  known: string[];
  /** Version of qemu-system-x86 in the lists. */
  listedQemu: string;
  sources: Record<string, string>;
}

const PACKAGES =
  'g++ make python3 nbdkit libnbd-bin python3-libnbd nbd-client nbd-server fio busybox-static e2fsprogs cpio binutils iproute2 iperf3 iputils-ping socat util-linux openssl'.split(
    ' ',
  );
const KNOWN = [...PACKAGES, 'qemu-system-x86', 'qemu-utils', 'linux-image-cloud-amd64'];

class Bench {
  readonly folder = mkdtempSync(join(tmpdir(), 'bf-setup-'));
  readonly #world: World;

  constructor(t: TestContext, world: Partial<World>) {
    this.#world = {
      installed: PACKAGES,
      qemu: '10.0.2',
      uid: 0,
      known: KNOWN,
      listedQemu: '1:10.0.2+ds-2~bpo12+1',
      sources: { 'debian.sources': DEB822 },
      ...world,
    };
    t.after(() => rmSync(this.folder, { recursive: true }));
    mkdirSync(join(this.folder, 'bin'));
    mkdirSync(join(this.folder, 'etc/sources.list.d'), { recursive: true });
    for (const [name, text] of Object.entries(this.#world.sources)) {
      writeFileSync(
        join(this.folder, 'etc', name === 'sources.list' ? name : `sources.list.d/${name}`),
        text,
      );
    }
    const { installed, uid, known, listedQemu } = this.#world;
    this.#command('dpkg-query', `printf '%s:installed ' ${installed.join(' ')}`);
    writeFileSync(join(this.folder, 'os-release'), 'VERSION_CODENAME=bookworm\n');
    this.#command('id', `echo ${uid}`);
    this.#command(
      'apt-get',
      'echo "apt-get $*" >>log; [ ! -e fail ] || { echo apt is unhappy; exit 100; }; case "$*" in *-t*qemu*) cp new-qemu bin/qemu-system-x86_64;; esac',
    );
    this.#command(
      'apt-cache',
      `case $1 in policy) case ' ${known.join(' ')} ' in *" $2 "*) echo "  Candidate: 1.0";; esac;; madison) echo "qemu-system-x86 | ${listedQemu} | x";; esac`,
    );
    this.#command('qemu-nbd', 'true');
    this.#qemu('new-qemu', '10.0.2');
    if (this.#world.qemu !== null) this.#qemu('bin/qemu-system-x86_64', this.#world.qemu);
    else this.#command('qemu-system-x86_64', 'exit 127');
  }

  /** Runs shell words after setup.sh was sourced. */
  run(words: string): { status: number | null; stdout: string; stderr: string; log: string[] } {
    const script = `set -euo pipefail; . '${repositoryRoot}/bin/lib/setup.sh'; setup_backports_file=backports.sources setup_os_release=os-release; ${words}`;
    const env = {
      ...process.env,
      PATH: `${this.folder}/bin:${process.env.PATH}`,
      SETUP_APT_ETC: `${this.folder}/etc`,
    };
    const result = spawnSync('bash', ['-c', script], { cwd: this.folder, env, encoding: 'utf8' });
    const log = existsSync(join(this.folder, 'log'))
      ? readFileSync(join(this.folder, 'log'), 'utf8').trim().split('\n')
      : [];
    return { status: result.status, stdout: result.stdout, stderr: result.stderr, log };
  }

  #command(name: string, body: string): void {
    writeFileSync(join(this.folder, 'bin', name), `#!/bin/sh\n${body}\n`, { mode: 0o755 });
  }

  #qemu(path: string, version: string): void {
    writeFileSync(join(this.folder, path), `#!/bin/sh\necho 'QEMU emulator version ${version} (Debian)'\n`, {
      mode: 0o755,
    });
  }
}

/** The packages of an apt-get line, without its options. */
function packagesOf(line: string): string {
  return line.replace(/ -o \S+| -y| -q| --no-install-recommends/g, '');
}

test('nothing is missing: nothing is said or done', (t) => {
  const { status, stdout, stderr, log } = new Bench(t, {}).run('setup_apt');
  assert.deepEqual({ status, stdout, stderr, log }, { status: 0, stdout: '', stderr: '', log: [] });
});

test('as root, what is missing is installed, and QEMU from backports of the machine’s own archive', (t) => {
  const bench = new Bench(t, {
    installed: PACKAGES.filter((name) => name !== 'fio' && name !== 'cpio'),
    qemu: '7.2.22',
    sources: { 'sources.list': VENDOR, 'debian.sources': DEB822 },
  });
  const { status, stderr, log } = bench.run('setup_apt');
  assert.equal(status, 0, stderr);
  assert.deepEqual(log.map(packagesOf), [
    'apt-get update',
    'apt-get install --download-only fio cpio',
    'apt-get install fio cpio',
    'apt-get install --download-only -t bookworm-backports qemu-system-x86 qemu-utils',
    'apt-get install -t bookworm-backports qemu-system-x86 qemu-utils',
  ]);
  const expected = `Types: deb\nURIs: ${MIRROR}\nSuites: bookworm-backports\nComponents: main\nSigned-By: ${KEY}\n`;
  assert.equal(readFileSync(join(bench.folder, 'backports.sources'), 'utf8'), expected);
});

test('backports that are configured are used as they are; their lists are read when they were not', (t) => {
  const sources = {
    'debian.sources': `${DEB822}\n${DEB822.replace('bookworm bookworm-updates', 'bookworm-backports')}`,
  };
  const fresh = new Bench(t, { qemu: null, sources });
  assert.equal(fresh.run('setup_apt').log[0]!.includes('update'), false);
  assert.ok(!existsSync(join(fresh.folder, 'backports.sources')));
  const unread = new Bench(t, { qemu: null, sources, listedQemu: '1:7.2+dfsg-7' });
  assert.equal(unread.run('setup_apt').log[0], 'apt-get update');
});

test('the old format of sources, with and without a key', (t) => {
  const wanted = `Types: deb\nURIs: ${MIRROR}\nSuites: bookworm-backports\nComponents: main\n`;
  for (const [line, text] of [
    [`deb ${MIRROR} bookworm contrib main\n`, wanted],
    [`deb [ arch=amd64 signed-by=${KEY} ] ${MIRROR} bookworm main\n`, `${wanted}Signed-By: ${KEY}\n`],
  ]) {
    const bench = new Bench(t, {
      sources: { 'sources.list': `# deb http://no.test bookworm main\n${VENDOR}${line}` },
    });
    assert.equal(bench.run('setup_sources_for bookworm-backports bookworm').stdout, text);
  }
  const vendorOnly = new Bench(t, { sources: { 'sources.list': VENDOR } });
  assert.equal(vendorOnly.run('setup_sources_for bookworm-backports bookworm').status, 1);
});

test('without root: the packages, one command, exit 1, and nothing is run', (t) => {
  const bench = new Bench(t, {
    uid: 1000,
    installed: PACKAGES.filter((name) => name !== 'fio'),
    qemu: '7.2.22',
  });
  const { status, stderr, log } = bench.run('setup_apt');
  assert.equal(status, 1);
  assert.deepEqual(log, []);
  assert.match(stderr, /packages are missing: fio qemu-system-x86 qemu-utils\n/);
  const command = stderr.trim().split('\n').at(-1)!;
  assert.match(
    command,
    /^ {2}printf .*bookworm-backports.* && apt-get update && apt-get install -y --no-install-recommends fio && /,
  );
  assert.match(
    command,
    /&& apt-get install -y --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils$/,
  );
  const written = spawnSync('bash', ['-c', command.split(' >')[0]!], { encoding: 'utf8' });
  assert.equal(
    written.stdout,
    `Types: deb\nURIs: ${MIRROR}\nSuites: bookworm-backports\nComponents: main\nSigned-By: ${KEY}\n`,
  );
});

test('empty package lists are read once; apt that fails is shown', (t) => {
  const empty = new Bench(t, { known: [] });
  assert.deepEqual(empty.run('setup_apt').log, ['apt-get update']);
  const broken = new Bench(t, { installed: PACKAGES.slice(1) });
  writeFileSync(join(broken.folder, 'fail'), '');
  const { status, stderr } = broken.run('setup_apt');
  assert.equal(status, 1);
  assert.match(stderr, /apt is unhappy\n.*failed: reading the package lists/s);
});
