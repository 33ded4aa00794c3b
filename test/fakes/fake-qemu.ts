/**
 * A stand-in for QEMU's program: takes QEMU's arguments, speaks QMP, and moves nothing. `-fake BEHAVIOUR` among its arguments says what
 * goes wrong; `writeFakeQemu` makes an executable of it.
 */

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { FakeQmp } from './fake-qmp.js';

export type FakeBehaviour =
  | 'well'
  | 'dies-at-start'
  | 'no-greeting-then-dies'
  | 'deaf' // ignores quit and SIGTERM
  | 'dies-in-migration'
  | 'migration-fails'
  | 'stays-stopped' // after migrate_cancel
  | 'never-cancels'
  | 'completes-on-cancel'
  | 'hangs-in-device'
  | 'incoming-fails';

/** An executable in `folder`; its path. */
export function writeFakeQemu(folder: string): string {
  const path = join(folder, 'fake-qemu');
  const program = fileURLToPath(import.meta.url);
  writeFileSync(path, `#!/bin/sh\nexec '${process.execPath}' '${program}' "$@"\n`, { mode: 0o755 });
  return path;
}

async function main(words: string[]): Promise<void> {
  if (words.includes('--version')) {
    process.stdout.write('QEMU emulator version 10.0.2 (a fake)\n');
    return;
  }
  const behaviour = words[words.indexOf('-fake') + 1] as FakeBehaviour;
  const die = (why: string) => {
    process.stderr.write(`qemu: ${why}\n`, () => process.exit(1));
  };
  if (behaviour === 'dies-at-start') {
    die('could not open disk image: No such file');
    return;
  }
  const path = /^socket,id=blockferry-qmp,path=([^,]+)/m.exec(
    words.find((word) => word.includes('blockferry-qmp,path'))!,
  )![1]!;
  const incoming = words.includes('-incoming');
  let state = incoming ? 'inmigrate' : 'running';
  let migration: Record<string, unknown> = {};
  const done = { return: {} } as const;

  const set = (status: string, more: Record<string, unknown> = {}) => {
    migration = { ...migration, status, ...more };
    qmp.migration(status);
  };
  const soon = (step: () => void) => {
    setImmediate(step);
    return done;
  };
  const qmp: FakeQmp = await FakeQmp.listen(path, {
    ...(behaviour === 'no-greeting-then-dies' ? { greeting: null } : {}),
    handlers: {
      'query-status': () => ({ return: { status: state, running: state === 'running' } }),
      'query-migrate': () => ({ return: migration }),
      'migrate-set-capabilities': () => done,
      'migrate-set-parameters': () => done,
      'migrate-incoming': () => {
        migration = {
          status: 'setup',
          'socket-address': [{ type: 'inet', host: '127.0.0.1', port: '4444' }],
        };
        return soon(() => {
          if (behaviour !== 'incoming-fails') return;
          set('failed');
          die('load of migration failed: Input/output error');
        });
      },
      migrate: () =>
        soon(() => {
          migration = {};
          set('setup');
          set('active');
          if (behaviour === 'dies-in-migration') die('internal error: migration stream lost');
          else if (behaviour === 'migration-fails')
            set('failed', { 'error-desc': 'Unable to write to socket: Broken pipe' });
          else {
            state = 'paused';
            qmp.event('STOP');
            set('pre-switchover');
          }
        }),
      'migrate-continue': () =>
        soon(() => {
          set('device');
          if (behaviour === 'hangs-in-device') return;
          state = 'postmigrate';
          set('completed', {
            downtime: 7,
            'total-time': 100,
            ram: { transferred: 5, remaining: 0, total: 9, mbps: 8 },
          });
        }),
      migrate_cancel: () => {
        if (behaviour === 'never-cancels' || migration.status === 'completed') return done;
        return soon(() => {
          if (behaviour === 'completes-on-cancel') {
            set('completed');
            return;
          }
          set('cancelling');
          set('cancelled');
          if (behaviour === 'stays-stopped') return;
          state = 'running';
          qmp.event('RESUME');
        });
      },
      quit: () => (behaviour === 'deaf' ? 'silence' : soon(() => process.exit(0))),
    },
  });
  if (behaviour === 'deaf') process.on('SIGTERM', () => {});
  if (behaviour === 'no-greeting-then-dies')
    await qmp.connected.then(() => die('cannot set up guest memory'));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main(process.argv.slice(2));
