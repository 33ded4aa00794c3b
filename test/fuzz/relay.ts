/** A unix socket, or a TCP port, that leads to another unix socket, and somebody who sees and changes what passes. */
import net from 'node:net';

export interface Passing {
  /** What to send on in place of `bytes`, each piece in a turn of its own; null: hang up on both. */
  fromClient(bytes: Buffer): Buffer[] | null;
  fromServer(bytes: Buffer): Buffer[] | null;
}

export interface Relay {
  readonly address: net.AddressInfo | string;
  stop(): Promise<void>;
}

export async function startRelay(
  listen: string | { port: number },
  to: string,
  passing: () => Passing,
): Promise<Relay> {
  const sockets = new Set<net.Socket>();
  const server = net.createServer({ allowHalfOpen: true }, (client) => {
    const upstream = net.connect({ path: to, allowHalfOpen: true });
    const via = passing();
    const hangUp = (): void => {
      client.destroy();
      upstream.destroy();
    };
    for (const socket of [client, upstream]) {
      sockets.add(socket);
      socket.on('close', () => sockets.delete(socket));
      socket.on('error', hangUp);
    }
    pump(client, upstream, (bytes) => via.fromClient(bytes), hangUp);
    pump(upstream, client, (bytes) => via.fromServer(bytes), hangUp);
  });
  await new Promise<void>((resolve) => {
    if (typeof listen === 'string') server.listen(listen, resolve);
    else server.listen(listen.port, '127.0.0.1', resolve);
  });
  return {
    address: server.address()!,
    async stop() {
      for (const socket of sockets) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

function pump(
  from: net.Socket,
  into: net.Socket,
  change: (bytes: Buffer) => Buffer[] | null,
  hangUp: () => void,
): void {
  const queue: (Buffer | 'end' | 'gone')[] = [];
  let busy = false;
  const next = (): void => {
    const piece = queue.shift();
    busy = piece !== undefined;
    if (piece === undefined) return;
    if (piece === 'gone') hangUp();
    else if (piece === 'end') into.end();
    else if (into.writable) into.write(piece);
    setImmediate(next);
  };
  const add = (...pieces: (Buffer | 'end' | 'gone')[]): void => {
    queue.push(...pieces);
    if (!busy) next();
  };
  from.on('data', (bytes: Buffer) => add(...(change(bytes) ?? ['gone' as const])));
  from.on('end', () => add('end'));
  from.on('close', () => add('end'));
}
