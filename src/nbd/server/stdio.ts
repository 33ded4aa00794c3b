/** Standard input and output as one connection, as libnbd's connect_command and inetd give it. */
import { fstatSync } from 'node:fs';
import net from 'node:net';
import { Duplex } from 'node:stream';
import { BlockferryError, messageOf } from '../../errors.js';

/** Nothing else in the process may read standard input or write standard output. Throws 'address'. */
export function openStdio(): Duplex {
  try {
    const input = fstatSync(0);
    const output = fstatSync(1);
    if (input.isSocket() && input.ino === output.ino && input.dev === output.dev)
      return new net.Socket({ fd: 0, readable: true, writable: true, allowHalfOpen: true });
    return Duplex.from({
      readable: new net.Socket({ fd: 0, readable: true, writable: false }),
      writable: new net.Socket({ fd: 1, readable: false, writable: true }),
    });
  } catch (error) {
    throw new BlockferryError(
      'address',
      `cannot serve on stdio: it must be a socket or a pair of pipes that an NBD client holds (${messageOf(error)})`,
      { cause: error },
    );
  }
}
