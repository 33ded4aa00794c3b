/**
 * The HTTP server of the control API. A route is a method, a pattern and a schema; whatever else arrives is answered with an
 * error and never reaches a handler. Garbage ends its connection and nothing else.
 */

import { chmodSync, mkdirSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import { dirname } from 'node:path';
import type { Logger } from 'pino';
import type { z } from 'zod';
import { BlockferryError, messageOf } from '../../errors.js';
import { describeIssues } from '../config.js';
import { HTTP_STATUS, REQUEST_BODY_BYTES_MAX } from './api.js';
import { clearStaleSocket } from './socket.js';

const HEADER_BYTES_MAX = 16 << 10;
const CONNECTIONS_MAX = 128;
const HEADERS_TIMEOUT_MS = 10_000;
const BODY_TIMEOUT_MS = 30_000;
const KEEP_ALIVE_MS = 30_000;

/** The caller is gone when `signal` aborts: a long poll ends then. */
export type Handler<Body> = (call: {
  params: Record<string, string>;
  body: Body;
  signal: AbortSignal;
}) => Promise<unknown>;

export interface Route {
  method: string;
  /** `/v1/volumes/:name`: a word after a colon matches one path segment. */
  pattern: string;
  schema: z.ZodType;
  handler: Handler<unknown>;
}

/** A route whose handler gets what its schema makes of the body. */
export function route<Schema extends z.ZodType>(
  method: 'GET' | 'POST' | 'DELETE',
  pattern: string,
  schema: Schema,
  handler: Handler<z.infer<Schema>>,
): Route {
  return { method, pattern, schema, handler: handler as Handler<unknown> };
}

interface Answer {
  status: number;
  body: unknown;
  allow?: string;
  /** The rest of the request is not read: the connection ends with the answer. */
  close?: boolean;
}

function failure(status: number, code: string, message: string): Answer {
  return { status, body: { error: { code, message } } };
}

export class ControlServer {
  private readonly routes: { route: Route; words: string[] }[];

  private constructor(
    private readonly server: Server,
    readonly path: string,
    routes: readonly Route[],
    private readonly log: Logger,
  ) {
    this.routes = routes.map((entry) => ({ route: entry, words: entry.pattern.split('/') }));
  }

  /** Listens on the unix socket `path`, for its owner only. Fails with 'address'. */
  static async listen(path: string, routes: readonly Route[], log: Logger): Promise<ControlServer> {
    try {
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    } catch (error) {
      throw new BlockferryError('address', `cannot make the folder of ${path}: ${messageOf(error)}`, {
        cause: error,
      });
    }
    await clearStaleSocket(path);
    const server = createServer({
      maxHeaderSize: HEADER_BYTES_MAX,
      headersTimeout: HEADERS_TIMEOUT_MS,
      requestTimeout: BODY_TIMEOUT_MS,
      keepAliveTimeout: KEEP_ALIVE_MS,
    });
    server.maxConnections = CONNECTIONS_MAX;
    const control = new ControlServer(server, path, routes, log);
    server.on('request', (request, response) => void control.serve(request, response));
    server.on('clientError', rejectGarbage);
    await new Promise<void>((resolve, reject) => {
      server.once('error', (error) =>
        reject(
          new BlockferryError('address', `cannot listen on ${path}: ${messageOf(error)}`, { cause: error }),
        ),
      );
      // The socket file is made within this call, so that it never exists with wider permissions.
      const umask = process.umask(0o177);
      try {
        server.listen({ path }, resolve);
      } finally {
        process.umask(umask);
      }
    });
    chmodSync(path, 0o600);
    server.on('error', (error) => log.error({ err: error }, 'control socket'));
    return control;
  }

  /** Ends all connections, long polls included, and removes the socket. */
  async close(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.server.close(() => resolve());
      this.server.closeAllConnections();
    });
  }

  private async serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const gone = new AbortController();
    response.once('close', () => gone.abort());
    request.on('error', () => gone.abort());
    response.on('error', () => gone.abort());
    const answer = await this.answer(request, gone.signal);
    if (response.destroyed) return;
    const text = `${JSON.stringify(answer.body ?? {})}\n`;
    response.statusCode = answer.status;
    response.setHeader('content-type', 'application/json');
    response.setHeader('content-length', Buffer.byteLength(text));
    if (answer.allow !== undefined) response.setHeader('allow', answer.allow);
    if (answer.close) {
      response.setHeader('connection', 'close');
      response.once('finish', () => request.destroy());
    }
    response.end(text);
  }

  private async answer(request: IncomingMessage, signal: AbortSignal): Promise<Answer> {
    const method = request.method ?? '';
    const path = (request.url ?? '').split('?')[0];
    const found = this.find(method, path);
    if ('status' in found) {
      request.resume();
      return found;
    }
    const text = await readBody(request);
    if (typeof text !== 'string') return text;
    let body: unknown;
    try {
      body = text.trim() === '' ? undefined : JSON.parse(text);
    } catch (error) {
      return failure(400, 'usage', `the body is no JSON: ${messageOf(error)}`);
    }
    const checked = found.route.schema.safeParse(body);
    if (!checked.success) return failure(400, 'usage', describeIssues(checked.error, 'the body'));
    try {
      return {
        status: 200,
        body: await found.route.handler({ params: found.params, body: checked.data, signal }),
      };
    } catch (error) {
      if (error instanceof BlockferryError)
        return failure(HTTP_STATUS[error.code], error.code, error.message);
      this.log.error({ err: error, method, path }, 'a control request failed unexpectedly');
      return failure(500, 'control', `unexpected failure: ${messageOf(error)}`);
    }
  }

  private find(method: string, path: string): Answer | { route: Route; params: Record<string, string> } {
    const words = path.split('/');
    const allowed = new Set<string>();
    for (const entry of this.routes) {
      const params = match(entry.words, words);
      if (!params) continue;
      if (entry.route.method === method) return { route: entry.route, params };
      allowed.add(entry.route.method);
    }
    if (allowed.size === 0) return failure(404, 'not-found', `no such path: ${printable(path)}`);
    const allow = [...allowed].join(', ');
    return { ...failure(405, 'usage', `${printable(method)} is not for this path: use ${allow}`), allow };
  }
}

function printable(text: string): string {
  return JSON.stringify(text.slice(0, 200));
}

function match(pattern: string[], words: string[]): Record<string, string> | null {
  if (pattern.length !== words.length) return null;
  const params: Record<string, string> = {};
  for (const [index, word] of pattern.entries()) {
    if (!word.startsWith(':')) {
      if (word !== words[index]) return null;
      continue;
    }
    try {
      params[word.slice(1)] = decodeURIComponent(words[index]);
    } catch {
      return null;
    }
  }
  return params;
}

/** The body as text, or the answer to one that is too large or breaks off. */
async function readBody(request: IncomingMessage): Promise<string | Answer> {
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    for await (const chunk of request.iterator({ destroyOnReturn: false })) {
      length += (chunk as Buffer).length;
      if (length > REQUEST_BODY_BYTES_MAX) {
        const answer = failure(413, 'usage', `the body is larger than ${REQUEST_BODY_BYTES_MAX} bytes`);
        return { ...answer, close: true };
      }
      chunks.push(chunk as Buffer);
    }
  } catch (error) {
    return { ...failure(400, 'usage', `the body broke off: ${messageOf(error)}`), close: true };
  }
  return Buffer.concat(chunks).toString('utf8');
}

function rejectGarbage(_error: Error, socket: Socket): void {
  if (!socket.writable) {
    socket.destroy();
    return;
  }
  const body = `${JSON.stringify({ error: { code: 'usage', message: 'this is no HTTP request' } })}\n`;
  socket.end(
    `HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\nconnection: close\r\n\r\n${body}`,
    () => socket.destroy(),
  );
}
