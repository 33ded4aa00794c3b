/** A daemon as a process: the line that says it is ready, the word to systemd, signals, the exit. */

import { execFile } from 'node:child_process';
import pino, { type Logger } from 'pino';
import { messageOf } from '../errors.js';
import { Daemon, type DaemonOptions } from './daemon.js';

const NOTIFY_TIMEOUT_MS = 5000;

/** Logs go to stderr: stdout has the readiness line only, or an NBD session. */
export function daemonLog(name: string, level: string): Logger {
  return pino({ name, level, base: null }, pino.destination({ dest: 2, sync: true }));
}

/**
 * Runs a daemon until SIGTERM, SIGINT or SIGHUP, or until the client on stdio is gone. `ready` gets the NBD URIs once. A second
 * signal ends the guests' time to power off.
 */
export async function runDaemon(options: DaemonOptions, ready: (uris: string[]) => void): Promise<void> {
  const asked = new AbortController();
  const hurry = new AbortController();
  const onSignal = (signal: NodeJS.Signals): void => {
    options.log.info({ signal }, 'stopping');
    if (asked.signal.aborted) hurry.abort();
    asked.abort();
  };
  const signals: NodeJS.Signals[] = ['SIGTERM', 'SIGINT', 'SIGHUP'];
  for (const signal of signals) process.on(signal, onSignal);
  try {
    const daemon = await Daemon.start(options);
    const status = await daemon.status();
    const uris = status.volumes.flatMap((volume) => (volume.phase === 'unavailable' ? [] : volume.uri));
    ready(status.daemon.linkUri === null ? uris : [...uris, status.daemon.linkUri]);
    await notifySystemd(options.log);
    if (!asked.signal.aborted) {
      const signalled = new Promise<void>((resolve) => {
        asked.signal.addEventListener('abort', () => resolve(), { once: true });
      });
      try {
        await Promise.race([signalled, daemon.volumes.stdioClosed(), daemon.failed]);
      } catch (error) {
        options.log.fatal({ err: error }, 'stopping');
        await daemon.stop(hurry.signal);
        throw error;
      }
    }
    await daemon.stop(hurry.signal);
  } finally {
    for (const signal of signals) process.removeListener(signal, onSignal);
  }
}

/** Node has no datagram unix sockets, so systemd's own program speaks for us, if systemd started us. */
function notifySystemd(log: Logger): Promise<void> {
  if (process.env.NOTIFY_SOCKET === undefined) return Promise.resolve();
  return new Promise((resolve) => {
    const args = ['--ready', `--pid=${process.pid}`];
    execFile('systemd-notify', args, { timeout: NOTIFY_TIMEOUT_MS }, (error) => {
      if (error) log.warn(`systemd was not notified: ${messageOf(error)}`);
      resolve();
    });
  });
}
