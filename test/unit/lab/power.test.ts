import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { buildPreload, PowerLoss } from '../../lab/crash/power.js';
import { Random } from '../../lab/crash/random.js';

const PAGE = 4096;
const folder = mkdtempSync(join(tmpdir(), 'blockferry-power-'));
after(() => rmSync(folder, { recursive: true }));

const library = buildPreload(folder);
let lives = 0;

/** What a daemon of these statements did, in `root`; `end` may change what its last, unfinished step left there. */
function live(
  root: string,
  power: PowerLoss,
  statements: string,
  end: (log: string) => void = () => {},
): void {
  const log = join(folder, `log-${++lives}`);
  execFileSync(process.execPath, ['-e', `const fs = require('node:fs'); ${statements}`], {
    env: { ...process.env, LD_PRELOAD: library, CRASH_ROOT: root, CRASH_LOG: log },
  });
  end(log);
  power.replay(log);
}

/** The log as it is when the process dies in its last step: without the record that the step, and what followed, was over. */
function cutLastEnd(log: string): void {
  const bytes = readFileSync(log);
  let last = 0;
  for (let at = 0; at < bytes.length; ) {
    if (bytes.readUInt32LE(at + 4) === 3) last = at;
    at += 56 + bytes.readUInt32LE(at + 40) + bytes.readUInt32LE(at + 44) + bytes.readUInt32LE(at + 48);
  }
  writeFileSync(log, bytes.subarray(0, last));
}

function fresh(): { root: string; image: string; power: PowerLoss } {
  const root = join(folder, `root-${++lives}`);
  const image = join(root, 'image');
  mkdirSync(root);
  writeFileSync(image, Buffer.alloc(4 * PAGE, 1));
  return { root, image, power: new PowerLoss(root) };
}

test('a write that a kill cut short never reaches the disk behind the cut', () => {
  const { root, image, power } = fresh();
  live(
    root,
    power,
    `const fd = fs.openSync(${JSON.stringify(image)}, 'r+'); fs.writeSync(fd, Buffer.alloc(4 * ${PAGE}, 2), 0, 4 * ${PAGE}, 0)`,
    (log) => {
      cutLastEnd(log);
      writeFileSync(image, Buffer.concat([Buffer.alloc(PAGE, 2), Buffer.alloc(3 * PAGE, 1)]));
    },
  );
  for (let seed = 1; seed <= 20; seed++) {
    power.strike(new Random(seed), 0.5);
    assert.deepEqual(readFileSync(image).subarray(PAGE), Buffer.alloc(3 * PAGE, 1));
  }
});

test('what it left is lost with the power, until the next daemon’s sync', () => {
  const { root, image, power } = fresh();
  const write = `const fd = fs.openSync(${JSON.stringify(image)}, 'r+'); fs.writeSync(fd, Buffer.alloc(${PAGE}, 2), 0, ${PAGE}, 0)`;
  live(root, power, write, cutLastEnd);
  const kept = readFileSync(image);
  power.strike(new Random(1), 1);
  assert.deepEqual(readFileSync(image), Buffer.alloc(4 * PAGE, 1));
  writeFileSync(image, kept);
  live(root, power, `fs.fdatasyncSync(fs.openSync(${JSON.stringify(image)}, 'r+'))`);
  power.strike(new Random(1), 1);
  assert.deepEqual(readFileSync(image), kept);
});

test('a name that was made, moved or removed in the last step counts as the next daemon finds it', () => {
  for (const statement of ['renameSync(from, to)', 'unlinkSync(from)', "writeFileSync(to, '')"]) {
    for (const done of [true, false]) {
      const { root, image, power } = fresh();
      const to = join(root, 'other');
      const names = `const from = ${JSON.stringify(image)}, to = ${JSON.stringify(to)};`;
      const before = readFileSync(image);
      live(root, power, `${names} fs.${statement}`, (log) => {
        cutLastEnd(log);
        if (done) return;
        rmSync(to, { force: true });
        writeFileSync(image, before);
      });
      const what = () => [image, to].map((path) => existsSync(path));
      const found = what();
      power.strike(new Random(1), 0);
      assert.deepEqual(what(), found, `${statement}, ${done ? 'done' : 'not done'}`);
    }
  }
});
