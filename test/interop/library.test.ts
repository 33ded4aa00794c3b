// `blockferry/nbd` as somebody who installed the package has it: packed, unpacked elsewhere, compiled with strict types, and the
// examples of docs/library.md run against each other and against other people's programs.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { repositoryRoot } from '../lab/cache.js';
import { startPeer } from './servers.js';
import { attempt, needs, tool } from './tools.js';

const MIB = 1 << 20;
const START_TIMEOUT_MS = 20_000;

let folder: string;
/** Of somebody else's program. */
let consumer: string;
/** The package as it is installed there. */
let installed: string;

function examples(): Map<string, string> {
  const page = readFileSync(join(repositoryRoot, 'docs/library.md'), 'utf8');
  const fences = page.matchAll(/^```ts run (\S+)\n([\s\S]*?)^```$/gm);
  return new Map([...fences].map(([, name, text]) => [name, text]));
}

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-library-'));
  consumer = join(folder, 'consumer');
  installed = join(consumer, 'node_modules/blockferry');
  mkdirSync(join(consumer, 'node_modules/@types'), { recursive: true });
  mkdirSync(installed);
  // Not by `npm install`, which would want the registry: what npm would do with the tarball, and the dependencies that are here.
  await tool('npm', 'pack', '--silent', '--ignore-scripts', '--pack-destination', folder, repositoryRoot);
  const [tarball] = readdirSync(folder).filter((name) => name.endsWith('.tgz'));
  await tool('tar', 'xzf', join(folder, tarball), '--strip-components=1', '-C', installed);
  const modules = join(repositoryRoot, 'node_modules');
  symlinkSync(modules, join(installed, 'node_modules'));
  symlinkSync(join(modules, '@types/node'), join(consumer, 'node_modules/@types/node'));
  for (const [name, text] of examples()) writeFileSync(join(consumer, name), text);
  const compilerOptions = {
    ...{ target: 'es2022', module: 'nodenext', moduleResolution: 'nodenext', types: ['node'] },
    ...{ strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true },
    ...{ noUnusedLocals: true, skipLibCheck: false },
  };
  writeFileSync(join(consumer, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }));
  writeFileSync(join(consumer, 'package.json'), JSON.stringify({ name: 'consumer', type: 'module' }));
});
after(() => rmSync(folder, { recursive: true, force: true }));

/** Names that a declaration file exports from others, and their files. */
function reexports(file: string): Map<string, string> {
  const found = new Map<string, string>();
  const lines = readFileSync(file, 'utf8').matchAll(/^export (?:type )?\{([^}]*)\} from '([^']+)\.js';$/gm);
  for (const [, list, from] of lines) {
    const names = list.split(',').map((word) => word.replace('type ', '').trim());
    for (const name of names.filter((one) => one !== '')) found.set(name, join(file, '..', `${from}.d.ts`));
  }
  return found;
}

function node(...words: string[]): ReturnType<typeof attempt> {
  return attempt([process.execPath, ...words], { cwd: consumer });
}

/** Runs a module of one's own text. */
function script(text: string, type: 'module' | 'commonjs' = 'module'): ReturnType<typeof attempt> {
  return node('--no-warnings', `--input-type=${type}`, '--eval', text);
}

/** Calls `scenario` while the example server runs, and ends it with SIGTERM. */
async function withServer(scenario: (uris: string[], disk: string) => Promise<void>): Promise<void> {
  const disk = join(consumer, 'disk.img');
  writeFileSync(disk, 'the first bytes');
  truncateSync(disk, 8 * MIB);
  const words = ['--pdeathsig', 'KILL', '--', process.execPath, 'server.js', disk];
  const child = spawn('setpriv', words, { cwd: consumer, stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    said += text;
  });
  const exited = once(child, 'exit');
  try {
    child.stdout.setEncoding('utf8');
    const timeout = AbortSignal.timeout(START_TIMEOUT_MS);
    const [line] = (await Promise.race([
      once(child.stdout, 'data', { signal: timeout }),
      exited.then(() => Promise.reject(new Error(`the server ended: ${said}`))),
    ])) as [string];
    assert.match(line, /^ready /);
    await scenario(line.trim().split(' ').slice(1), disk);
    child.kill('SIGTERM');
    assert.deepEqual(await exited, [0, null], said);
  } finally {
    child.kill('SIGKILL');
    await exited;
  }
}

const CLIENT_SAYS = [
  'exports: memory, disk',
  `${64 * MIB} bytes, writable`,
  'bytes: 0 0 4 4',
  'failed with source-io, errno 5',
  'closed',
];

describe('blockferry/nbd, installed', needs('npm', 'tar', 'setpriv'), () => {
  test('the tarball has code, declarations, native sources and documents, and nothing else', () => {
    const all = readdirSync(installed, { recursive: true, encoding: 'utf8' }).filter(
      (path) => !path.startsWith('node_modules'),
    );
    for (const path of ['dist/src/library/nbd.js', 'dist/src/library/nbd.d.ts', 'native/src/binding.cc'])
      assert.ok(all.includes(path), path);
    assert.deepEqual(
      all.filter((path) => /\.map$|\.test\.|(^|\/)test\/|^bench\/|\.node$|(?<!\.d)\.ts$/.test(path)),
      [],
    );
    for (const path of all.filter((name) => name.startsWith('dist') && name.endsWith('.js')))
      assert.ok(all.includes(path.replace(/\.js$/, '.d.ts')), path);
  });

  test('the examples compile, with strict types and the declarations checked', async () => {
    assert.deepEqual([...examples().keys()], ['server.ts', 'client.ts']);
    for (const [name, text] of examples()) assert.ok(text.split('\n').length <= 40, name);
    const tsc = join(repositoryRoot, 'node_modules/typescript/bin/tsc');
    const { code, stdout } = await node(tsc, '-p', consumer);
    assert.equal(code, 0, stdout);
  });

  test('every exported thing is described in its declaration', () => {
    const exported = reexports(join(installed, 'dist/src/library/nbd.d.ts'));
    assert.ok(exported.size > 25);
    for (const [name, from] of exported) {
      const file = reexports(from).get(name) ?? from;
      const described = new RegExp(
        `\\*/\\nexport (declare )?(class|interface|type|function|const) ${name}\\b`,
      );
      assert.match(readFileSync(file, 'utf8'), described, `${name} has no docstring`);
    }
  });

  test('everything else is closed', async () => {
    for (const path of ['blockferry', 'blockferry/dist/src/nbd/client/client.js', 'blockferry/nbd.js']) {
      const { code, stderr } = await script(`await import('${path}')`);
      assert.equal(code, 1);
      assert.match(stderr, /ERR_PACKAGE_PATH_NOT_EXPORTED/);
    }
    assert.equal(
      (await script("console.log(require('blockferry/package.json').name)", 'commonjs')).stdout,
      'blockferry\n',
    );
  });

  // The tarball holds no built addon, and none was built here so far.
  test('the client needs no native code', async () => {
    const peer = await startPeer((_, socket) => ['nbdkit', '-f', '-U', socket, 'memory', '64M']);
    try {
      const { code, stdout, stderr } = await node('client.js', peer.uri);
      assert.equal(code, 0, stderr);
      const zeroes = [`65536 bytes of data`, `${2 * MIB - 65_536} bytes of zeroes`];
      assert.deepEqual(stdout.trim().split('\n'), [
        'exports: ',
        `${64 * MIB} bytes, writable`,
        'bytes: 0 0 4 4',
        ...[...zeroes, ...[`65536 bytes of data`, `${MIB - 65_536} bytes of zeroes`], `65536 bytes of data`],
        `${MIB - 65_536} bytes of zeroes`,
        'closed',
      ]);
      const text = `const { NbdClient } = require('blockferry/nbd'); NbdClient.connect('${peer.uri}').then(async (client) => {
        console.log(client.info.size); await client.close(); });`;
      const required = await script(text, 'commonjs');
      assert.equal(required.stdout, `${64 * MIB}\n`, required.stderr);
    } finally {
      await peer.stop();
    }
  });

  test('the server without the addon says what to do', async () => {
    const { code, stderr } = await script(
      "import { NbdServer } from 'blockferry/nbd'; await NbdServer.listen({ exports: [] });",
    );
    assert.equal(code, 1);
    assert.match(stderr, /the native addon .* is missing; build it: cd '.*blockferry' && npm run install/);
  });

  describe('with the addon', () => {
    before(() => symlinkSync(join(repositoryRoot, 'native/build'), join(installed, 'native/build')));

    test('the examples, one against the other', () =>
      withServer(async (uris) => {
        for (const uri of uris) {
          const { code, stdout, stderr } = await node('client.js', uri);
          assert.equal(code, 0, stderr);
          assert.deepEqual(stdout.trim().split('\n'), CLIENT_SAYS);
        }
      }));

    test('the client, and a server that goes away', async () => {
      const text = `
        import { NbdClient } from 'blockferry/nbd';
        const client = await NbdClient.connect(process.argv[1]);
        console.log('there');
        console.log((await client.closed)?.code);
        await client.read(0, 1).catch((error) => console.log(error.code));`;
      let said = '';
      let closed: Promise<unknown> = Promise.resolve();
      await withServer(async ([uri]) => {
        const words = ['--input-type=module', '--eval', text, uri!];
        const child = spawn(process.execPath, words, { cwd: consumer, stdio: ['ignore', 'pipe', 'inherit'] });
        closed = once(child, 'close');
        child.stdout.setEncoding('utf8').on('data', (more: string) => {
          said += more;
        });
        await once(child.stdout, 'data', { signal: AbortSignal.timeout(START_TIMEOUT_MS) });
      });
      await closed;
      assert.equal(said, 'there\nclosed\nclosed\n');
    });

    test('the server and nbdinfo, nbdcopy, qemu-io', needs('nbdinfo', 'nbdcopy', 'qemu-io'), () =>
      withServer(async ([unix, tcp], disk) => {
        const listed = JSON.parse(await tool('nbdinfo', '--json', '--list', unix!));
        assert.deepEqual(
          listed.exports.map((one: Record<string, unknown>) => [
            one['export-name'],
            one['export-size'],
            one.contexts,
          ]),
          [
            ['memory', 64 * MIB, []],
            ['disk', 8 * MIB, ['base:allocation', 'qemu:allocation-depth']],
          ],
        );
        const commands = [
          'w -P 7 1000 70000',
          'r -P 7 1000 70000',
          'w -z 4k 8k',
          'discard 1M 1M',
          'flush',
          'r -P 0 4k 8k',
        ];
        const words = ['qemu-io', '-f', 'raw', ...commands.flatMap((one) => ['-c', one])];
        for (const uri of [unix!, tcp!]) assert.doesNotMatch(await tool(...words, uri), /fail|error/i);
        const { stdout } = await attempt(['qemu-io', '-f', 'raw', '-c', 'r 40M 512', tcp!]);
        assert.match(stdout, /read failed: Input\/output error/);

        const raw = unix!.replace('/memory', '/disk');
        assert.match(
          await tool('nbdinfo', '--map', raw),
          /^ +0 +4096 +0 +data\n +4096 +8384512 +3 +hole,zero$/m,
        );
        assert.doesNotMatch(await tool(...words, raw), /fail|error/i);
        const copied = join(folder, 'copied');
        await tool('nbdcopy', raw, copied);
        assert.ok(readFileSync(copied).equals(readFileSync(disk)));
        assert.equal(readFileSync(disk).toString('latin1', 0, 15), 'the first bytes');
      }),
    );
  });

  test('the client and qemu-nbd', needs('qemu-nbd', 'truncate'), async () => {
    const peer = await startPeer(async (directory, socket) => {
      const image = join(directory, 'disk.img');
      await tool('truncate', '-s', '64M', image);
      return ['qemu-nbd', '-t', '-f', 'raw', '-x', 'disk', '-k', socket, image];
    });
    try {
      const { code, stdout, stderr } = await node('client.js', peer.uriOf('disk'));
      assert.equal(code, 0, stderr);
      const said = stdout.trim().split('\n');
      assert.deepEqual(said.slice(0, 3), ['exports: disk', `${64 * MIB} bytes, writable`, 'bytes: 0 0 4 4']);
      assert.ok(said.includes('65536 bytes of data'), stdout);
    } finally {
      await peer.stop();
    }
  });
});
