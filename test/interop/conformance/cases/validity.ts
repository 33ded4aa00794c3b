/** «Request types», «Request flags», «Error values»: commands and flags that are not allowed, read-only exports. */
import { strict as assert } from 'node:assert';
import { Command, CommandFlag, Errno } from '../../../../src/nbd/constants.js';
import {
  assertBytes,
  BASE_ALLOCATION,
  type Case,
  type Lab,
  must,
  pattern,
  reading,
  should,
} from '../case.js';
import { type Asked, errnoName } from '../transmission.js';

const AT = 3 << 20;
const UNKNOWN_FLAG = 0x8000;
const { EINVAL, EPERM, ENOTSUP, OK } = Errno;

type Name = keyof typeof COMMANDS;
const COMMANDS = {
  READ: { command: Command.READ, offset: AT, length: 4096 },
  WRITE: { command: Command.WRITE, offset: AT, payload: pattern(4096, 31) },
  FLUSH: { command: Command.FLUSH },
  TRIM: { command: Command.TRIM, offset: AT, length: 4096 },
  CACHE: { command: Command.CACHE, offset: AT, length: 4096 },
  WRITE_ZEROES: { command: Command.WRITE_ZEROES, offset: AT, length: 4096 },
  BLOCK_STATUS: { command: Command.BLOCK_STATUS, offset: AT, length: 4096 },
} satisfies Record<string, Asked>;

const OFFERED = {
  FLUSH: 'SEND_FLUSH',
  TRIM: 'SEND_TRIM',
  CACHE: 'SEND_CACHE',
  WRITE_ZEROES: 'SEND_WRITE_ZEROES',
} as const;

async function ready(lab: Lab, name: Name, structured?: boolean) {
  lab.needsSize(8 << 20);
  if (name in OFFERED) lab.needsFlag(OFFERED[name as keyof typeof OFFERED]);
  if (name === 'WRITE') lab.needsWritable();
  if (name === 'BLOCK_STATUS') lab.needsContexts();
  const contexts = name === 'BLOCK_STATUS' ? { contexts: [BASE_ALLOCATION] } : {};
  return lab.go({ ...contexts, ...(structured === undefined ? {} : { structured }) });
}

function refusesFlag(what: string, name: Name, flags: number, structured?: boolean): Case {
  return should('C3', `${what}: EINVAL`, async (lab) => {
    const transmission = await ready(lab, name, structured);
    await transmission.fails({ ...COMMANDS[name], flags }, EINVAL);
    await transmission.goesOn();
  });
}

const flagCases = [
  ...(Object.keys(COMMANDS) as Name[]).map((name) =>
    refusesFlag(`an unknown flag on ${name}`, name, UNKNOWN_FLAG),
  ),
  refusesFlag('NO_HOLE on READ', 'READ', CommandFlag.NO_HOLE),
  refusesFlag('REQ_ONE on READ', 'READ', CommandFlag.REQ_ONE),
  refusesFlag('DF on READ without structured replies', 'READ', CommandFlag.DF, false),
  refusesFlag('DF on WRITE', 'WRITE', CommandFlag.DF),
  refusesFlag('NO_HOLE on WRITE', 'WRITE', CommandFlag.NO_HOLE),
  refusesFlag('FAST_ZERO on WRITE', 'WRITE', CommandFlag.FAST_ZERO),
  refusesFlag('PAYLOAD_LEN of extended headers on WRITE', 'WRITE', 1 << 5),
  refusesFlag('NO_HOLE on TRIM', 'TRIM', CommandFlag.NO_HOLE),
  refusesFlag('DF on WRITE_ZEROES', 'WRITE_ZEROES', CommandFlag.DF),
  refusesFlag('REQ_ONE on WRITE_ZEROES', 'WRITE_ZEROES', CommandFlag.REQ_ONE),
  refusesFlag('DF on BLOCK_STATUS', 'BLOCK_STATUS', CommandFlag.DF),
  refusesFlag('NO_HOLE on BLOCK_STATUS', 'BLOCK_STATUS', CommandFlag.NO_HOLE),
  must('C3', 'a WRITE with an unknown flag writes nothing, and its payload is consumed', async (lab) => {
    const transmission = await ready(lab, 'WRITE');
    const before = pattern(4096, 32);
    await transmission.write(AT, before);
    const { errno } = await transmission.ask({ ...COMMANDS.WRITE, flags: UNKNOWN_FLAG });
    lab.needs(errno !== OK, 'a refusal of unknown flags');
    assertBytes(await transmission.read(AT, 4096), before, 'what is read back');
  }),
  should('C3', 'FAST_ZERO that is not offered: EINVAL; offered: success or ENOTSUP', async (lab) => {
    lab.needsFlag('SEND_WRITE_ZEROES');
    lab.needsSize(8 << 20);
    const transmission = await lab.go();
    const before = pattern(4096, 33);
    await transmission.write(AT, before);
    const offered = (transmission.facts.flags & (1 << 11)) !== 0;
    const asked = { ...COMMANDS.WRITE_ZEROES, flags: CommandFlag.FAST_ZERO };
    const { errno } = await transmission.fails(asked, ...(offered ? [OK, ENOTSUP] : [EINVAL]));
    const after = errno === OK ? Buffer.alloc(4096) : before;
    assertBytes(await transmission.read(AT, 4096), after, 'what is read back');
    return offered ? `offered: ${errnoName(errno)}` : 'not offered: EINVAL';
  }),
  must('C3', 'WRITE_ZEROES without FAST_ZERO is never ENOTSUP', async (lab) => {
    await (await ready(lab, 'WRITE_ZEROES')).done(COMMANDS.WRITE_ZEROES);
  }),
];

const commandCases = [
  ...[8, 9, 99, 0xffff].map((command) =>
    should('C3', `command ${command}: EINVAL`, async (lab) => {
      const transmission = await lab.go();
      await transmission.fails({ command, offset: 0, length: 512 }, EINVAL);
      await transmission.goesOn();
    }),
  ),
  should('C3', 'a CACHE that is not offered does not disconnect', async (lab) => {
    const transmission = await lab.go();
    lab.needs((transmission.facts.flags & (1 << 10)) === 0, 'a server without CACHE');
    return transmission.choice(COMMANDS.CACHE);
  }),
  should('C3', 'BLOCK_STATUS without a selected context: EINVAL', async (lab) => {
    lab.needsStructured();
    const transmission = await lab.go();
    await transmission.fails({ command: Command.BLOCK_STATUS, offset: 0, length: 4096 }, EINVAL);
    await transmission.goesOn();
  }),
  should('C3', 'BLOCK_STATUS without structured replies: EINVAL', async (lab) => {
    const transmission = await lab.go({ structured: false });
    await transmission.fails({ command: Command.BLOCK_STATUS, offset: 0, length: 4096 }, EINVAL);
    await transmission.goesOn();
  }),
  must('C3', 'only the errors of the protocol are sent', async (lab) => {
    const transmission = await lab.go();
    const { size } = transmission.facts;
    const allowed = new Set<number>(Object.values(Errno));
    for (const asked of [
      { command: 99 },
      reading(size, 512),
      reading(0, 512, UNKNOWN_FLAG),
      { command: Command.WRITE, offset: size, payload: Buffer.alloc(512) },
      { command: Command.TRIM, offset: size, length: 512 },
      { command: Command.WRITE_ZEROES, offset: size, length: 512 },
      { command: Command.CACHE, offset: size, length: 512 },
      { command: Command.BLOCK_STATUS, offset: size, length: 512 },
    ]) {
      const { errno } = await transmission.ask(asked);
      assert.ok(allowed.has(errno), `command ${asked.command}: errno ${errno}`);
    }
  }),
];

const readOnlyCases = [
  ...(['WRITE', 'TRIM', 'WRITE_ZEROES'] as const).map((name) =>
    should('C3', `${name} on a read-only export: EPERM`, async (lab) => {
      const transmission = await lab.go({ readOnly: true });
      await transmission.fails({ ...COMMANDS[name], offset: 0 }, EPERM);
      await transmission.goesOn();
    }),
  ),
  must('C3', 'a read-only export is not changed by WRITE, TRIM and WRITE_ZEROES', async (lab) => {
    const transmission = await lab.go({ readOnly: true });
    const before = await transmission.read(0, 4096);
    for (const name of ['WRITE', 'TRIM', 'WRITE_ZEROES'] as const)
      assert.notEqual((await transmission.ask({ ...COMMANDS[name], offset: 0 })).errno, OK, name);
    assertBytes(await transmission.read(0, 4096), before, 'what is read back');
  }),
  must('C3', 'READ and FLUSH on a read-only export succeed', async (lab) => {
    const transmission = await lab.go({ readOnly: true });
    await transmission.read(0, 4096);
    if ((transmission.facts.flags & (1 << 2)) !== 0) await transmission.done({ command: Command.FLUSH });
  }),
];

export const validityCases = [...flagCases, ...commandCases, ...readOnlyCases];
