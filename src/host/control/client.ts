/** The client of the control API: one daemon, reached at the path of its control socket. */

import { Agent, request as httpRequest, type IncomingMessage } from 'node:http';
import { BlockferryError, type ErrorCode, messageOf } from '../../errors.js';
import type { MachineDefinition, MigrationInfo } from '../../hypervisor/driver.js';
import type { RetreatProof, RoundCut, Tracking } from '../service.js';
import {
  type CreateVolume,
  type HostControl,
  HTTP_STATUS,
  type MachineView,
  RESPONSE_BODY_BYTES_MAX,
  type StatusView,
  type VolumeView,
} from './api.js';

/** A call that makes things durable or starts a process may take this long. */
const CALL_TIMEOUT_MS = 120_000;
/** A long poll is answered this much later than it asked for, at the latest. */
const POLL_GRACE_MS = 10_000;
const CONNECTIONS_MAX = 16;

const REASON: Record<string, string> = {
  ENOENT: 'no such socket: is the daemon running?',
  ECONNREFUSED: 'nobody listens there: is the daemon running?',
  EACCES: 'permission denied: run as the user of the daemon',
  ENOTSOCK: 'this is no socket',
};

function isErrorCode(code: unknown): code is ErrorCode {
  return typeof code === 'string' && Object.hasOwn(HTTP_STATUS, code);
}

export class ControlClient implements HostControl {
  private readonly agent = new Agent({ keepAlive: true, maxSockets: CONNECTIONS_MAX });

  /** `address` is the path of a unix socket, with or without "unix:". */
  constructor(readonly address: string) {}

  private get path(): string {
    return this.address.replace(/^unix:/, '');
  }

  close(): void {
    this.agent.destroy();
  }

  status(): Promise<StatusView> {
    return this.call('GET', '/v1/status');
  }
  volume(name: string): Promise<VolumeView> {
    return this.call('GET', volumePath(name));
  }
  createVolume(request: CreateVolume): Promise<VolumeView> {
    return this.call('POST', '/v1/volumes', request);
  }
  takeover(name: string, generation?: number): Promise<{ generation: number }> {
    return this.call('POST', volumePath(name, 'takeover'), generation === undefined ? {} : { generation });
  }
  track(name: string, moveId: string, since: number | null): Promise<Tracking> {
    return this.call('POST', volumePath(name, 'track'), { moveId, since });
  }
  cut(name: string, moveId: string, cookie: number): Promise<RoundCut> {
    return this.call('POST', volumePath(name, 'cut'), { moveId, cookie });
  }
  async untrack(name: string, moveId: string): Promise<void> {
    await this.call('POST', volumePath(name, 'untrack'), { moveId });
  }
  async refresh(name: string, from: number, to: number): Promise<void> {
    await this.call('POST', volumePath(name, 'refresh'), { from, to });
  }
  async seal(name: string, generation: number): Promise<void> {
    await this.call('POST', volumePath(name, 'seal'), { generation });
  }
  async unseal(name: string, proof: RetreatProof): Promise<void> {
    await this.call('POST', volumePath(name, 'unseal'), {
      volumeId: proof.volumeId,
      generation: proof.generation,
    });
  }
  retreat(name: string): Promise<RetreatProof> {
    return this.call('POST', volumePath(name, 'retreat'));
  }
  cancelVolume(name: string, volumeId: string): Promise<RetreatProof> {
    return this.call('POST', volumePath(name, 'cancel'), { volumeId });
  }
  async retire(name: string, options: { deleteImage: boolean }): Promise<void> {
    await this.call('POST', volumePath(name, 'retire'), options);
  }
  async pause(name: string): Promise<void> {
    await this.call('POST', volumePath(name, 'pause'));
  }
  async resume(name: string): Promise<void> {
    await this.call('POST', volumePath(name, 'resume'));
  }
  async setRate(name: string, bytesPerSecond: number | null): Promise<void> {
    await this.call('POST', volumePath(name, 'rate'), { bytesPerSecond });
  }
  /** Resolves when the range is local, however long that takes. */
  async prefetch(name: string, offset: number, length: number): Promise<void> {
    await this.call('POST', volumePath(name, 'prefetch'), { offset, length }, 0);
  }
  waitHandoff(name: string, timeoutMs: number): Promise<{ done: boolean; volume: VolumeView }> {
    return this.call('POST', volumePath(name, 'handoff-wait'), { timeoutMs }, timeoutMs + POLL_GRACE_MS);
  }

  async machines(): Promise<MachineView[]> {
    return (await this.call<{ vms: MachineView[] }>('GET', '/v1/vms')).vms;
  }
  machine(name: string): Promise<MachineView> {
    return this.call('GET', machinePath(name));
  }
  startMachine(name: string): Promise<MachineView> {
    return this.call('POST', machinePath(name, 'start'));
  }
  stopMachine(
    name: string,
    options: { mode?: 'powerdown' | 'quit'; timeoutMs?: number } = {},
  ): Promise<MachineView> {
    return this.call('POST', machinePath(name, 'stop'), options);
  }
  async claim(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'claim'), { moveId });
  }
  async release(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'release'), { moveId });
  }
  incoming(name: string, moveId: string, definition: MachineDefinition): Promise<{ uri: string }> {
    return this.call('POST', machinePath(name, 'incoming'), { moveId, definition });
  }
  async migrate(
    name: string,
    moveId: string,
    uri: string,
    bandwidthBytesPerSecond: number | null,
  ): Promise<void> {
    await this.call('POST', machinePath(name, 'migrate'), { moveId, uri, bandwidthBytesPerSecond });
  }
  waitMigration(name: string, statuses: readonly string[], timeoutMs: number): Promise<MigrationInfo> {
    const body = { statuses, timeoutMs };
    return this.call('POST', machinePath(name, 'migration-wait'), body, timeoutMs + POLL_GRACE_MS);
  }
  async migrateContinue(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'migrate-continue'), { moveId });
  }
  async revive(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'revive'), { moveId });
  }
  waitRunning(name: string, timeoutMs: number): Promise<{ running: boolean }> {
    return this.call('POST', machinePath(name, 'running-wait'), { timeoutMs }, timeoutMs + POLL_GRACE_MS);
  }
  async depart(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'depart'), { moveId });
  }
  async discard(name: string, moveId: string): Promise<void> {
    await this.call('POST', machinePath(name, 'discard'), { moveId });
  }

  /** One request. `timeoutMs` 0 waits for ever. The answer's shape is the server's promise (the same version on both ends). */
  private call<Answer>(
    method: string,
    path: string,
    body?: unknown,
    timeoutMs = CALL_TIMEOUT_MS,
  ): Promise<Answer> {
    return new Promise<Answer>((resolve, reject) => {
      const settle = (error: BlockferryError | null, answer?: object): void => {
        clearTimeout(timer);
        if (error) reject(error);
        else resolve(answer as Answer);
      };
      const unreachable = (reason: string, cause?: unknown): void =>
        settle(
          new BlockferryError('control', `the daemon at ${this.path} cannot be reached: ${reason}`, {
            cause,
          }),
        );
      const text = body === undefined ? '' : JSON.stringify(body);
      const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) };
      const options = { socketPath: this.path, method, path, agent: this.agent, headers };
      const request = httpRequest(options, (response) => {
        receive(response, unreachable, (answer) =>
          response.statusCode === 200
            ? settle(null, answer)
            : settle(refusal(answer, response.statusCode ?? 0)),
        );
      });
      const expire = (): void => {
        unreachable(`no answer within ${Math.round(timeoutMs / 1000)} s`);
        request.destroy();
      };
      const timer = timeoutMs === 0 ? undefined : setTimeout(expire, timeoutMs);
      request.on('error', (error: NodeJS.ErrnoException) => {
        unreachable(REASON[error.code ?? ''] ?? messageOf(error), error);
      });
      request.end(text);
    });
  }
}

/** Collects an answer; calls one of the two, and then perhaps `unreachable` again, which counts for nothing any more. */
function receive(
  response: IncomingMessage,
  unreachable: (reason: string, cause?: unknown) => void,
  received: (answer: object) => void,
): void {
  const chunks: Buffer[] = [];
  let length = 0;
  response.on('data', (chunk: Buffer) => {
    length += chunk.length;
    if (length <= RESPONSE_BODY_BYTES_MAX) {
      chunks.push(chunk);
      return;
    }
    unreachable('its answer is too large');
    response.destroy();
  });
  response.on('error', (error) => unreachable(`its answer broke off (${messageOf(error)})`, error));
  response.on('end', () => {
    const answer = parse(Buffer.concat(chunks).toString('utf8'));
    if (answer === undefined) unreachable('what answers there is no blockferry daemon');
    else received(answer);
  });
  response.on('close', () => unreachable('its answer broke off'));
}

function volumePath(name: string, verb?: string): string {
  return `/v1/volumes/${encodeURIComponent(name)}${verb === undefined ? '' : `/${verb}`}`;
}

function machinePath(name: string, verb?: string): string {
  return `/v1/vms/${encodeURIComponent(name)}${verb === undefined ? '' : `/${verb}`}`;
}

function parse(text: string): object | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && value !== null ? value : undefined;
  } catch {
    return undefined;
  }
}

function refusal(answer: object, status: number): BlockferryError {
  const error = (answer as { error?: { code?: unknown; message?: unknown } }).error;
  const message =
    typeof error?.message === 'string' ? error.message : `the daemon answered with HTTP status ${status}`;
  return new BlockferryError(isErrorCode(error?.code) ? error.code : 'control', message);
}
