// Real clients haggle with the listener: what they list and are told is what the directory says.
import assert from 'node:assert/strict';
import { type ChildProcess, execFile, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Option } from '../../src/nbd/constants.js';
import { clientFlags, GREETING_BYTES, option } from '../support/handshake.js';
import { RawClient, within } from '../support/raw-client.js';
import { needs, needsLibnbd, PYTHON } from './tools.js';

const run = promisify(execFile);
const SERVER = fileURLToPath(new URL('../support/listener-main.js', import.meta.url));

let folder: string;
let server: ChildProcess;
let uris: string[];

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-interop-'));
  const addresses = ['127.0.0.1:0', `unix:${join(folder, 's')}`];
  server = spawn('setpriv', ['--pdeathsig', 'KILL', '--', process.execPath, SERVER, ...addresses], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [line] = await within(once(createInterface(server.stdout!), 'line'), 'the server');
  uris = JSON.parse(line);
});

after(async () => {
  server.kill('SIGTERM');
  await within(once(server, 'exit'), 'the server to end');
  rmSync(folder, { recursive: true });
});

interface Listed {
  'export-name': string;
  description?: string;
  'export-size': number;
  is_read_only: boolean;
  can_multi_conn: boolean;
  can_flush: boolean;
  can_fua: boolean;
  can_trim: boolean;
  can_zero: boolean;
  can_df: boolean;
  can_cache: boolean;
  contexts?: string[];
  block_size_minimum: number;
  block_size_preferred: number;
  block_size_maximum: number;
}

async function nbdinfo(...args: string[]): Promise<{ exports: Listed[]; stderr: string }> {
  const { stdout, stderr } = await run('nbdinfo', ['--json', ...args], { timeout: 10_000 });
  return { ...JSON.parse(stdout), stderr };
}

describe('nbdinfo', needs('nbdinfo'), () => {
  for (const index of [0, 1])
    test(`--list over ${['TCP', 'a unix socket'][index]}`, async () => {
      const { exports } = await nbdinfo('--list', '--no-content', uris[index]!);
      const disk = exports.find((one) => one['export-name'] === 'disk')!;
      const data = exports.find((one) => one['export-name'] === 'data')!;
      assert.equal(exports.length, 2);
      assert.equal(disk.description, 'the root disk');
      assert.equal(disk['export-size'], 80 << 20);
      assert.deepEqual(disk.contexts, [
        'base:allocation',
        'qemu:allocation-depth',
        'qemu:dirty-bitmap:blockferry',
      ]);
      assert.deepEqual(
        [disk.block_size_minimum, disk.block_size_preferred, disk.block_size_maximum],
        [1, 4096, 64 << 20],
      );
      const can = [disk.can_flush, disk.can_fua, disk.can_trim, disk.can_zero, disk.can_df, disk.can_cache];
      assert.deepEqual(can, [true, true, true, true, true, true]);
      assert.equal(disk.can_multi_conn, true);
      assert.equal(data['export-size'], (1 << 20) + 512);
      assert.equal(data.is_read_only, true);
      assert.equal(data.block_size_preferred, 65_536);
    });

  test('one export by its URI', async () => {
    const { exports } = await nbdinfo('--no-content', uris[0]!);
    assert.equal(exports[0]!['export-name'], 'disk');
  });

  test('starts us by socket activation, and we know the name of the socket', async () => {
    const { exports, stderr } = await nbdinfo(
      '--list',
      '--no-content',
      '--',
      '[',
      process.execPath,
      SERVER,
      ']',
    );
    assert.equal(exports.length, 2);
    assert.match(stderr, /nbd\+unix:\/\/\/disk\?socket=\/tmp\//);
  });
});

describe("libnbd's Python", needsLibnbd(), () => {
  async function python(script: string, ...args: string[]): Promise<unknown> {
    const { stdout } = await run(PYTHON, ['-c', `import nbd, sys, json\nh = nbd.NBD()\n${script}`, ...args], {
      timeout: 10_000,
    });
    return JSON.parse(stdout);
  }

  test('speaks to us over stdio', async () => {
    const size = await python(
      'h.set_export_name("disk")\nh.connect_command(sys.argv[1:])\nprint(h.get_size())\nh.shutdown()',
      process.execPath,
      SERVER,
      'stdio',
    );
    assert.equal(size, 80 << 20);
  });

  test('over a pair of pipes too', async () => {
    const size = await python(
      'h.set_export_name("disk")\nh.connect_command(["sh", "-c", "cat | \\"$0\\" \\"$1\\" stdio | cat", *sys.argv[1:]])\nprint(h.get_size())\nh.shutdown()',
      process.execPath,
      SERVER,
    );
    assert.equal(size, 80 << 20);
  });

  test('with every handshake flag it may set, down to EXPORT_NAME and 124 zeroes', async () => {
    for (const flags of [0, 1, 2, 3]) {
      const size = await python(
        `h.set_handshake_flags(${flags})\nh.set_request_structured_replies(False)\nh.connect_uri(sys.argv[1])\nprint(h.get_size())\nh.shutdown()`,
        uris[0]!,
      );
      assert.equal(size, 80 << 20);
    }
  });

  test('in opt mode: info, list, contexts, an unknown export, go, in any order', async () => {
    const script = `
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
names = []
h.opt_list(lambda name, description: names.append(name))
try:
    h.set_export_name("nope"); h.opt_info(); refused = False
except nbd.Error:
    refused = True
h.set_export_name("data"); h.opt_info(); read_only = h.is_read_only()
h.set_export_name("disk")
contexts = []
h.add_meta_context("base:")
h.add_meta_context("x-unknown:y")
h.opt_list_meta_context(lambda name: contexts.append(name))
h.add_meta_context("base:allocation")
h.opt_go()
print(json.dumps([names, refused, read_only, contexts, h.can_meta_context("base:allocation"), h.can_meta_context("qemu:allocation-depth")]))
h.shutdown()`;
    assert.deepEqual(await python(script, uris[1]!), [
      ['disk', 'data'],
      true,
      true,
      ['base:allocation'],
      true,
      false,
    ]);
  });
});

test('qemu-nbd --list', needs('qemu-nbd'), async () => {
  const { stdout } = await run('qemu-nbd', ['--list', '-k', join(folder, 's')], { timeout: 10_000 });
  assert.match(stdout, /exports available: 2/);
  assert.match(stdout, /export: 'disk'\n\s+description: the root disk/);
  assert.match(stdout, /size: {2}83886080/);
  assert.match(stdout, /qemu:allocation-depth/);
});

test('nbd-client -l', needs('nbd-client'), async () => {
  const port = new URL(uris[0]!).port;
  const { stdout } = await run('nbd-client', ['-l', '127.0.0.1', port], { timeout: 10_000 });
  assert.match(stdout, /^disk/m);
  assert.match(stdout, /^data/m);
});

test('a listening TCP socket handed over as descriptor 3', needs(PYTHON), async () => {
  const script = `
import os, socket, sys
s = socket.create_server(("127.0.0.1", 0))
os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
print(s.getsockname()[1], flush=True)
os.execv(sys.argv[1], sys.argv[1:])`;
  const child = spawn(
    'setpriv',
    ['--pdeathsig', 'KILL', '--', PYTHON, '-c', script, process.execPath, SERVER],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  );
  const exited = once(child, 'exit');
  try {
    const [port] = await within(once(createInterface(child.stdout), 'line'), 'the port');
    const client = await RawClient.connect({ host: '127.0.0.1', port: Number(port) });
    client.send(clientFlags(), option(Option.ABORT));
    assert.equal((await client.receiveAll()).length, GREETING_BYTES + 20);
    client.close();
  } finally {
    child.kill('SIGTERM');
    assert.equal((await within(exited, 'the server to end'))[0], 0);
  }
});

test('stdio that is no client is refused with a reason', () => {
  const { status, stderr } = spawnSync(process.execPath, [SERVER, 'stdio'], {
    stdio: ['ignore', 'ignore', 'pipe'],
    encoding: 'utf8',
    timeout: 10_000,
  });
  assert.equal(status, 1);
  assert.match(stderr, /cannot serve on stdio/);
});
