import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { formatShare, LiveLine, progressLine } from '../../../src/cli/progress.js';
import type { ServedVolume } from '../../../src/host/control/api.js';

const SIZE = 2 ** 40;
const BLOCK = 4096;

function volume(change: Partial<ServedVolume>): ServedVolume {
  return {
    name: 'disk',
    id: 'id',
    phase: 'relocating',
    generation: 2,
    size: SIZE,
    presentBytes: 0,
    source: { uri: 'nbd://a/disk', state: 'connected', error: null },
    uri: [],
    background: {
      state: 'running',
      order: 'linear',
      rateBytesPerSecond: 50 << 20,
      rateLimitBytesPerSecond: null,
      etaSeconds: 90,
    },
    demand: { reads: 0, p50Ms: 0, p99Ms: 0 },
    preCopy: null,
    tracking: null,
    home: null,
    traffic: {
      fromSourceBytes: 0,
      demandBytes: 1 << 20,
      backgroundBytes: 0,
      wireBytes: 0,
      zeroBytes: 0,
      seedBytes: 0,
    },
    clients: 0,
    handoffAt: null,
    error: null,
    image: '/disk.img',
    linkUri: null,
    allocatedBytes: 0,
    ...change,
  };
}

describe('progress', () => {
  test('is never at 100 % before the volume is plain', () => {
    for (const missing of [BLOCK, BLOCK * 7, SIZE / 10_000, SIZE / 1000, 0]) {
      const share = Number(formatShare(volume({ presentBytes: SIZE - missing })));
      assert.ok(share <= 99.9, `${missing} bytes missing: ${share}`);
    }
    assert.equal(formatShare(volume({ presentBytes: SIZE })), '99.9');
    assert.equal(formatShare(volume({ presentBytes: SIZE, phase: 'standby' })), '99.9');
    assert.equal(formatShare(volume({ presentBytes: SIZE, phase: 'plain' })), '100.0');
  });

  test('rounds down', () => {
    assert.equal(formatShare(volume({ presentBytes: 0 })), '0.0');
    assert.equal(formatShare(volume({ presentBytes: SIZE * 0.42199 })), '42.1');
    assert.equal(formatShare(volume({ presentBytes: SIZE * 0.99899 })), '99.8');
  });

  test('a line says what moves, how fast, and what is in the way', () => {
    const moving = progressLine(volume({ presentBytes: SIZE / 2 }));
    assert.equal(
      moving,
      'disk: relocating 50.0 % of 1 TiB local, 50 MiB/s, 1 min 30 s left, 1 MiB on demand',
    );
    const lost = progressLine(
      volume({ source: { uri: 'nbd://a/disk', state: 'lost', error: 'connection refused' } }),
    );
    assert.match(lost, /source lost \(connection refused\)/);
    const paused = progressLine(volume({ background: { ...volume({}).background, state: 'paused' } }));
    assert.match(paused, /background paused/);
    assert.equal(
      progressLine(volume({ phase: 'plain', presentBytes: SIZE })),
      'disk: plain 100.0 % of 1 TiB local',
    );
    const broken = {
      name: 'x',
      phase: 'unavailable',
      retiredId: null,
      image: '',
      error: 'no image',
      home: null,
    } as const;
    assert.equal(progressLine(broken), 'x: not served: no image');
  });

  test('a terminal gets one line rewritten, a file a line a second', () => {
    const terminal: string[] = [];
    const live = new LiveLine({ write: (text) => terminal.push(text), isTTY: true, columns: 11 });
    live.show('0123456789abcdef');
    live.show('next');
    live.end();
    assert.deepEqual(terminal, ['\r\u001b[2K0123456789', '\r\u001b[2Knext', '\n']);

    const file: string[] = [];
    let now = 0;
    const plain = new LiveLine({ write: (text) => file.push(text) }, 1000, () => now);
    plain.show('a');
    now = 999;
    plain.show('b');
    now = 1000;
    plain.show('c');
    plain.print('end');
    plain.end();
    assert.deepEqual(file, ['a\n', 'c\n', 'end\n']);
  });
});
