import { Errno } from '../nbd/constants.js';
import type { IoRequest } from '../nbd/device.js';

/** What of a device is the same for all that can never be written to. */
export abstract class ReadOnlyFace {
  readonly readOnly = true;

  writeNow(): number {
    return Errno.EPERM;
  }

  write(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }

  flush(request: IoRequest): void {
    request.complete(Errno.OK); // it wrote nothing
  }

  trim(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }

  zero(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }
}
