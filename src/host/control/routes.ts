/** The route table of the control API: what each path does, in one line each. */

import { BlockferryError } from '../../errors.js';
import type { Machines } from '../machines.js';
import type { Volumes } from '../volumes.js';
import {
  cancelVolume,
  createVolume,
  cut,
  incoming,
  migrate,
  nothing,
  ofMove,
  prefetch,
  rate,
  refresh,
  retire,
  type StatusView,
  seal,
  stopMachine,
  takeover,
  track,
  unseal,
  wait,
  waitMigration,
} from './api.js';
import { type Route, route } from './server.js';

const POWERDOWN_MS = 30_000;

export function controlRoutes(parts: {
  status: () => Promise<StatusView>;
  /** Volumes and machines of an earlier run are known again: until then nothing may be said of them, not even that they are not there. */
  ready: () => boolean;
  volumes: Volumes;
  machines: Machines;
}): Route[] {
  const { volumes, machines } = parts;
  return [
    route('GET', '/v1/status', nothing, () => parts.status()),
    ...[
      ...volumeRoutes(volumes),
      route('GET', '/v1/vms', nothing, async () => ({ vms: await machines.views() })),
      ...machineRoutes(machines),
    ].map((entry) => whenReady(entry, parts.ready)),
  ];
}

function whenReady(entry: Route, ready: () => boolean): Route {
  const handler: Route['handler'] = (call) => {
    if (ready()) return entry.handler(call);
    return Promise.reject(
      new BlockferryError(
        'control',
        'the daemon is starting and does not know all its volumes yet: try again',
      ),
    );
  };
  return { ...entry, handler };
}

function volumeRoutes(volumes: Volumes): Route[] {
  const path = (verb: string): string => `/v1/volumes/:name/${verb}`;
  return [
    // A coordinator decides by this answer: what another one asked for before it was killed must have had its effect.
    route('GET', '/v1/volumes/:name', nothing, ({ params }) => volumes.quietView(params.name)),
    route('POST', '/v1/volumes', createVolume, ({ body }) => volumes.arrive(body)),
    route('POST', path('takeover'), takeover, ({ params, body }) =>
      volumes.takeover(params.name, body.generation),
    ),
    route('POST', path('track'), track, ({ params, body }) =>
      volumes.service(params.name).track(body.moveId, body.since),
    ),
    route('POST', path('cut'), cut, ({ params, body }) =>
      volumes.service(params.name).cut(body.moveId, body.cookie),
    ),
    route('POST', path('untrack'), ofMove, ({ params, body }) =>
      done(volumes.service(params.name).untrack(body.moveId)),
    ),
    route('POST', path('refresh'), refresh, ({ params, body }) =>
      done(volumes.service(params.name).refresh(body.from, body.to)),
    ),
    route('POST', path('seal'), seal, ({ params, body }) =>
      done(volumes.service(params.name).seal(body.generation)),
    ),
    route('POST', path('unseal'), unseal, ({ params, body }) =>
      done(volumes.service(params.name).unseal(body)),
    ),
    route('POST', path('retreat'), nothing, ({ params }) => volumes.service(params.name).retreat()),
    route('POST', path('cancel'), cancelVolume, ({ params, body }) =>
      volumes.cancel(params.name, body.volumeId),
    ),
    route('POST', path('retire'), retire, ({ params, body }) =>
      done(volumes.service(params.name).retire(body)),
    ),
    route('POST', path('pause'), nothing, async ({ params }) => volumes.service(params.name).pause()),
    route('POST', path('resume'), nothing, async ({ params }) => volumes.service(params.name).resume()),
    route('POST', path('rate'), rate, async ({ params, body }) =>
      volumes.service(params.name).setRate(body.bytesPerSecond),
    ),
    route('POST', path('prefetch'), prefetch, ({ params, body }) =>
      done(volumes.service(params.name).prefetch(body.offset, body.length)),
    ),
    route('POST', path('handoff-wait'), wait, async ({ params, body, signal }) => ({
      done: await volumes.waitHandoff(params.name, body.timeoutMs, signal),
      volume: await volumes.view(params.name),
    })),
  ];
}

function machineRoutes(machines: Machines): Route[] {
  const path = (verb: string): string => `/v1/vms/:name/${verb}`;
  return [
    route('GET', '/v1/vms/:name', nothing, ({ params }) => machines.view(params.name)),
    route('POST', path('start'), nothing, ({ params }) => machines.start(params.name)),
    route('POST', path('stop'), stopMachine, ({ params, body }) =>
      machines.stop(params.name, body.mode ?? 'powerdown', body.timeoutMs ?? POWERDOWN_MS),
    ),
    route('POST', path('claim'), ofMove, ({ params, body }) => machines.claim(params.name, body.moveId)),
    route('POST', path('release'), ofMove, ({ params, body }) => machines.release(params.name, body.moveId)),
    route('POST', path('incoming'), incoming, ({ params, body }) =>
      machines.incoming(params.name, body.moveId, body.definition),
    ),
    route('POST', path('migrate'), migrate, ({ params, body }) =>
      machines.migrate(params.name, body.moveId, body.uri, body.bandwidthBytesPerSecond),
    ),
    route('POST', path('migration-wait'), waitMigration, ({ params, body, signal }) =>
      machines.waitMigration(params.name, body.statuses, body.timeoutMs, signal),
    ),
    route('POST', path('migrate-continue'), ofMove, ({ params, body }) =>
      machines.migrateContinue(params.name, body.moveId),
    ),
    route('POST', path('revive'), ofMove, ({ params, body }) => machines.revive(params.name, body.moveId)),
    route('POST', path('running-wait'), wait, async ({ params, body, signal }) => ({
      running: await machines.waitRunning(params.name, body.timeoutMs, signal),
    })),
    route('POST', path('depart'), ofMove, ({ params, body }) => machines.depart(params.name, body.moveId)),
    route('POST', path('discard'), ofMove, ({ params, body }) => machines.discard(params.name, body.moveId)),
  ];
}

/** Answers with {} whatever the step resolved to. */
async function done(step: Promise<unknown>): Promise<object> {
  await step;
  return {};
}
