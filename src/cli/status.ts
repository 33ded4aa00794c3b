import type { Command } from 'commander';
import { BlockferryError } from '../errors.js';
import type { MachineView, VolumeView } from '../host/control/api.js';
import {
  controlCommand,
  type FindOptions,
  type FoundDaemon,
  findDaemonsOrFail,
  findVolume,
  printJson,
} from './common.js';
import { formatShare } from './progress.js';
import { formatLeft, formatRate, formatSize } from './units.js';

export function statusCommand(): Command {
  return controlCommand('status', 'show daemons, volumes and machines')
    .argument('[volume]', 'only this volume')
    .option('--json', 'for scripts: the volume, or the list of daemons', false)
    .action(async (name: string | undefined, options: FindOptions & { json: boolean }) => {
      if (name !== undefined) {
        const { volume } = await findVolume(name, options);
        if (options.json) printJson(volume);
        else process.stdout.write(volumeText(volume));
        if (volume.phase === 'unavailable')
          throw new BlockferryError('closed', `volume "${name}" is not served: ${volume.error}`);
        return;
      }
      const daemons = await findDaemonsOrFail(options);
      if (options.json)
        printJson(daemons.map(({ client, status }) => ({ control: client.address, ...status })));
      else process.stdout.write(daemons.map(daemonText).join('\n'));
    });
}

function daemonText({ client, status }: FoundDaemon): string {
  const { daemon, volumes, vms } = status;
  const link = daemon.linkUri === null ? '' : `, link ${daemon.linkUri}`;
  const head = `${daemon.kind} ${daemon.name} (blockferry ${daemon.version}, process ${daemon.pid}${link}) at ${client.address}\n`;
  return head + volumeTable(volumes) + machineTable(vms);
}

function volumeTable(volumes: VolumeView[]): string {
  if (volumes.length === 0) return '';
  const rows = volumes.map((volume) =>
    volume.phase === 'unavailable'
      ? [volume.name, volume.phase, '', '', '', volume.error]
      : [
          volume.name,
          volume.phase,
          String(volume.generation),
          formatSize(volume.size),
          `${formatShare(volume)} %`,
          remark(volume),
        ],
  );
  return table(['VOLUME', 'PHASE', 'GEN', 'SIZE', 'LOCAL', ''], rows);
}

function machineTable(vms: MachineView[]): string {
  if (vms.length === 0) return '';
  const rows = vms.map((vm) => [
    vm.name,
    vm.state,
    vm.pid === null ? '' : String(vm.pid),
    vm.definition.disks.map((disk) => disk.volume).join(','),
    vm.error ?? '',
  ]);
  return table(['VM', 'STATE', 'PID', 'DISKS', ''], rows);
}

function remark(volume: Exclude<VolumeView, { phase: 'unavailable' }>): string {
  const { background, source } = volume;
  if (volume.error !== null) return volume.error;
  if (source !== null && source.state !== 'connected')
    return `source ${source.state}: ${source.error ?? source.uri}`;
  if (volume.phase !== 'relocating') return '';
  if (background.state !== 'running') return `background ${background.state}`;
  const eta = background.etaSeconds === null ? '' : `, ${formatLeft(background.etaSeconds)} left`;
  return `${formatRate(background.rateBytesPerSecond)}${eta}`;
}

/** Columns as wide as they must be, the last one open. */
function table(head: string[], rows: string[][]): string {
  const widths = head.map((title, column) =>
    Math.max(title.length, ...rows.map((row) => row[column].length)),
  );
  return [head, ...rows]
    .map((row) => `  ${row.map((cell, column) => cell.padEnd(widths[column])).join('  ')}`.trimEnd())
    .map((line) => `${line}\n`)
    .join('');
}

function volumeText(volume: VolumeView): string {
  if (volume.phase === 'unavailable') return `${volume.name}: not served: ${volume.error}\n`;
  const { source, traffic, demand } = volume;
  const rows: [string, string][] = [
    ['volume', `${volume.name} (${volume.id})`],
    ['phase', `${volume.phase}, generation ${volume.generation}`],
    ['image', `${volume.image}, ${formatSize(volume.size)}, ${formatSize(volume.allocatedBytes)} on disk`],
    ['local', `${formatShare(volume)} %${remark(volume) === '' ? '' : ` (${remark(volume)})`}`],
    ['served at', volume.uri.join(' ')],
    ['clients', String(volume.clients)],
  ];
  if (source !== null) {
    rows.push(['source', `${source.uri} (${source.state})`]);
    rows.push([
      'on demand',
      `${demand.reads} reads, median ${demand.p50Ms} ms, 99 % within ${demand.p99Ms} ms`,
    ]);
  }
  if (traffic.fromSourceBytes > 0 || traffic.zeroBytes > 0 || traffic.seedBytes > 0) {
    const fetched = `${formatSize(traffic.demandBytes)} on demand, ${formatSize(traffic.backgroundBytes)} in the background`;
    const seeded = traffic.seedBytes > 0 ? `, ${formatSize(traffic.seedBytes)} were in seeds here` : '';
    rows.push(['fetched', `${fetched}, ${formatSize(traffic.zeroBytes)} were zero${seeded}`]);
  }
  if (volume.handoffAt !== null) rows.push(['handed off', volume.handoffAt]);
  return rows.map(([key, value]) => `${key.padEnd(10)}  ${value}\n`).join('');
}
