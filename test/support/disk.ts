/** A disk in memory whose every four bytes tell where they belong, and the directory of exports that has it as `disk` and nothing else. */

import { defaultOrNamed, type ExportDirectory, type ExportEntry } from '../../src/nbd/server/exports.js';
import { MemoryDevice } from '../fakes/memory-device.js';

/** `size` in bytes, a multiple of 4. */
export function diskOf(size: number): { device: MemoryDevice; exports: ExportDirectory } {
  const device = new MemoryDevice(size);
  for (let at = 0; at < size; at += 4) device.data.writeUInt32LE((at * 2_654_435_761) >>> 0, at);
  const disk: ExportEntry = {
    name: 'disk',
    description: '',
    size,
    readOnly: false,
    contexts: [],
    preferredBlock: 4096,
    multiConn: true,
    open: () => device,
  };
  return {
    device,
    exports: { list: () => [disk], find: (name) => defaultOrNamed([disk], name), shuttingDown: false },
  };
}
