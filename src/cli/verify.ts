import { Command } from 'commander';
import { BlockferryError } from '../errors.js';
import { compareDisks } from '../host/compare.js';
import { LiveLine } from './progress.js';
import { formatSize } from './units.js';

export function verifyCommand(): Command {
  return new Command('verify')
    .description(
      'compare two disks byte by byte; exit code 1 and the first differing offset when they differ',
    )
    .argument('<a>', 'NBD URI or raw image')
    .argument('<b>', 'NBD URI or raw image')
    .action(async (a: string, b: string) => {
      const line = new LiveLine(process.stderr);
      const showing = process.stderr.isTTY === true;
      try {
        const result = await compareDisks(a, b, (done, size) => {
          if (showing) line.show(`${formatSize(done)} of ${formatSize(size)} compared`);
        });
        line.end();
        if (result.kind === 'same') {
          process.stdout.write(`identical: ${result.sizeBytes} bytes\n`);
          return;
        }
        const how =
          result.kind === 'size'
            ? `in size: ${result.a} and ${result.b} bytes`
            : `first at offset ${result.offset}`;
        throw new BlockferryError('source-mismatch', `${a} and ${b} differ ${how}`);
      } finally {
        line.end();
      }
    });
}
