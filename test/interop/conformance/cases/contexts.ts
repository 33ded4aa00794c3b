/** «Metadata querying», LIST_META_CONTEXT and SET_META_CONTEXT. */
import { strict as assert } from 'node:assert';
import { Command, Errno, Info, Option, OptionReply } from '../../../../src/nbd/constants.js';
import { counted, infoData, metaData, u32 } from '../../../support/handshake.js';
import { BASE_ALLOCATION, type Lab, must, should } from '../case.js';
import { assertType, contextsOf, factsOf, type Haggle, nameOf } from '../haggle.js';
import { Transmission } from '../transmission.js';

const { ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG, ACK } = OptionReply;
const LIST = Option.LIST_META_CONTEXT;
const SET = Option.SET_META_CONTEXT;
const BOTH = [
  ['LIST_META_CONTEXT', LIST],
  ['SET_META_CONTEXT', SET],
] as const;

async function haggled(lab: Lab): Promise<Haggle> {
  lab.needsContexts();
  const haggle = await lab.haggle();
  await haggle.structured();
  return haggle;
}

async function listed(lab: Lab, queries: string[]): Promise<string[]> {
  return (await (await haggled(lab)).contexts(LIST, lab.name, queries)).map(({ name }) => name);
}

async function selected(lab: Lab, queries: string[]): Promise<string[]> {
  return (await (await haggled(lab)).contexts(SET, lab.name, queries)).map(({ name }) => name);
}

/** Enters transmission; whether BLOCK_STATUS works there. */
async function statusAfter(lab: Lab, haggle: Haggle): Promise<number> {
  const facts = factsOf(await haggle.agreed(Option.GO, infoData(lab.name, [Info.BLOCK_SIZE])));
  const transmission = new Transmission(haggle.wire, facts, {
    structured: true,
    extended: false,
    contexts: [],
  });
  return (await transmission.ask({ command: Command.BLOCK_STATUS, offset: 0, length: 4096 })).errno;
}

async function setAndHas(lab: Lab, expected: number, ...steps: ((haggle: Haggle) => Promise<unknown>)[]) {
  const haggle = await haggled(lab);
  assert.equal((await haggle.contexts(SET, lab.name, [BASE_ALLOCATION])).length, 1);
  for (const step of steps) await step(haggle);
  assert.equal(await statusAfter(lab, haggle), expected);
}

const MALFORMED: [what: string, data: (name: string) => Buffer][] = [
  ['no data', () => Buffer.alloc(0)],
  ['7 bytes of data', () => Buffer.alloc(7)],
  ['a name longer than its data', (name) => Buffer.concat([u32(name.length + 9), Buffer.from(name), u32(0)])],
  ['a query that is missing', (name) => Buffer.concat([counted(name), u32(2), counted(BASE_ALLOCATION)])],
  [
    'a query longer than its data',
    (name) => Buffer.concat([counted(name), u32(1), u32(99), Buffer.alloc(9)]),
  ],
];

const malformedCases = BOTH.flatMap(([what, number]) => [
  ...MALFORMED.map(([fault, data]) =>
    must('C1', `${what} with ${fault}: ERR_INVALID, and the handshake goes on`, async (lab) => {
      const haggle = await haggled(lab);
      await haggle.refused(number, data(lab.name), ERR_INVALID);
      await haggle.goesOn();
    }),
  ),
  should('C1', `${what} with a count of 2^32 - 1 queries: ERR_INVALID or ERR_TOO_BIG`, async (lab) => {
    const haggle = await haggled(lab);
    await haggle.refused(
      number,
      Buffer.concat([counted(lab.name), u32(0xffff_ffff)]),
      ERR_INVALID,
      ERR_TOO_BIG,
    );
    await haggle.goesOn();
  }),
  should('C1', `${what} for an unknown export is refused, and the handshake goes on`, async (lab) => {
    const haggle = await haggled(lab);
    await haggle.refused(number, metaData(lab.unknownName(), [BASE_ALLOCATION]), ERR_UNKNOWN);
    await haggle.goesOn();
  }),
  must('C1', `${what}: a query without a colon is ignored or ERR_INVALID`, async (lab) => {
    const haggle = await haggled(lab);
    const { all, final } = await haggle.ask(number, metaData(lab.name, ['allocation']));
    assertType(final, [ACK, ERR_INVALID]);
    assert.equal(all.length, 1);
    await haggle.goesOn();
    return nameOf(final);
  }),
  must('C1', `${what} with bytes behind its queries: ERR_INVALID, or they are ignored`, async (lab) => {
    const haggle = await haggled(lab);
    const data = Buffer.concat([metaData(lab.name, [BASE_ALLOCATION]), Buffer.alloc(3)]);
    const { final } = await haggle.ask(number, data);
    assertType(final, [ACK, ERR_INVALID]);
    await haggle.goesOn();
    return nameOf(final);
  }),
  must('C1', `${what}: an unknown namespace is ignored`, async (lab) => {
    const haggle = await haggled(lab);
    assert.deepEqual(await haggle.contexts(number, lab.name, ['x-nobody:knows', 'also-not:']), []);
  }),
  must('C1', `${what}: an unknown leaf of base is ignored`, async (lab) => {
    const haggle = await haggled(lab);
    const { all, final } = await haggle.ask(number, metaData(lab.name, ['base:nothing']));
    assertType(final, [ACK]);
    assert.equal(all.length, 1);
  }),
  must('C1', `${what}: what is known is found among what is not`, async (lab) => {
    const haggle = await haggled(lab);
    const found = await haggle.contexts(number, lab.name, [
      'x-nobody:knows',
      BASE_ALLOCATION,
      'base:nothing',
    ]);
    assert.deepEqual(
      found.map(({ name }) => name),
      [BASE_ALLOCATION],
    );
  }),
  should('C1', `${what} with 100 queries is answered, with ERR_TOO_BIG at worst`, async (lab) => {
    const haggle = await haggled(lab);
    const queries = Array.from({ length: 100 }, (_, index) => `x-nobody:${index}`);
    const { final } = await haggle.ask(number, metaData(lab.name, queries));
    assertType(final, [ACK, ERR_TOO_BIG, ERR_INVALID]);
    await haggle.goesOn();
    return nameOf(final);
  }),
]);

const listCases = [
  must('C1', 'LIST_META_CONTEXT without queries lists base:allocation', async (lab) => {
    assert.ok((await listed(lab, [])).includes(BASE_ALLOCATION));
  }),
  must('C1', 'LIST_META_CONTEXT base: lists base:allocation, and base alone', async (lab) => {
    const names = await listed(lab, ['base:']);
    assert.ok(names.includes(BASE_ALLOCATION), `${names}`);
    assert.ok(
      names.every((name) => name.startsWith('base:')),
      `${names}`,
    );
  }),
  must('C1', 'LIST_META_CONTEXT base:allocation lists just that', async (lab) => {
    assert.deepEqual(await listed(lab, [BASE_ALLOCATION]), [BASE_ALLOCATION]);
  }),
  must('C1', 'LIST_META_CONTEXT for the empty name: the default export, or ERR_UNKNOWN', async (lab) => {
    const { final } = await (await haggled(lab)).ask(LIST, metaData('', []));
    assertType(final, [ACK, ERR_UNKNOWN]);
    return nameOf(final);
  }),
  must('C1', 'LIST_META_CONTEXT without structured replies: the list or ERR_INVALID', async (lab) => {
    lab.needsContexts();
    const haggle = await lab.haggle();
    const { final } = await haggle.ask(LIST, metaData(lab.name, []));
    assertType(final, [ACK, ERR_INVALID]);
    await haggle.goesOn();
    return nameOf(final);
  }),
  must('C1', 'LIST_META_CONTEXT selects nothing', async (lab) => {
    const haggle = await haggled(lab);
    await haggle.contexts(LIST, lab.name, [BASE_ALLOCATION]);
    assert.equal(await statusAfter(lab, haggle), Errno.EINVAL);
  }),
];

const setCases = [
  must('C1', 'SET_META_CONTEXT base:allocation selects it', async (lab) => {
    assert.deepEqual(await selected(lab, [BASE_ALLOCATION]), [BASE_ALLOCATION]);
  }),
  must('C1', 'SET_META_CONTEXT without queries selects nothing', async (lab) => {
    assert.deepEqual(await selected(lab, []), []);
  }),
  must('C1', 'SET_META_CONTEXT base: selects nothing', async (lab) => {
    const { all, final } = await (await haggled(lab)).ask(SET, metaData(lab.name, ['base:']));
    assert.equal(all.length, 1, `one reply, ${nameOf(final)}`);
  }),
  should('C1', 'SET_META_CONTEXT without structured replies: ERR_INVALID', async (lab) => {
    lab.needsContexts();
    const haggle = await lab.haggle();
    await haggle.refused(SET, metaData(lab.name, [BASE_ALLOCATION]), ERR_INVALID);
    await haggle.goesOn();
  }),
  should('C1', 'SET_META_CONTEXT with the same query twice selects once', async (lab) => {
    assert.deepEqual(await selected(lab, [BASE_ALLOCATION, BASE_ALLOCATION]), [BASE_ALLOCATION]);
  }),
  must('C1', 'SET_META_CONTEXT of all that is listed: the ids differ', async (lab) => {
    const haggle = await haggled(lab);
    const { all, final } = await haggle.ask(SET, metaData(lab.name, [...lab.target.contexts]));
    assertType(final, [ACK]);
    const contexts = contextsOf(all.slice(0, -1));
    assert.equal(new Set(contexts.map(({ id }) => id)).size, contexts.length);
    return contexts.map(({ name }) => name).join(', ');
  }),
  must('C1', 'SET_META_CONTEXT, then GO: BLOCK_STATUS is answered', (lab) => setAndHas(lab, Errno.OK)),
  must('C1', 'SET_META_CONTEXT holds across INFO, LIST_META_CONTEXT and unknown options', (lab) =>
    setAndHas(
      lab,
      Errno.OK,
      (haggle) => haggle.ask(Option.INFO, infoData(lab.name)),
      (haggle) => haggle.ask(LIST, metaData(lab.name, [])),
      (haggle) => haggle.goesOn(),
    ),
  ),
  must('C1', 'SET_META_CONTEXT without queries takes back an earlier one', (lab) =>
    setAndHas(lab, Errno.EINVAL, (haggle) => haggle.contexts(SET, lab.name, [])),
  ),
  must('C1', 'SET_META_CONTEXT that finds nothing takes back an earlier one', (lab) =>
    setAndHas(lab, Errno.EINVAL, (haggle) => haggle.contexts(SET, lab.name, ['x-nobody:knows'])),
  ),
  must('C1', 'SET_META_CONTEXT for an unknown export takes back an earlier one', (lab) =>
    setAndHas(lab, Errno.EINVAL, (haggle) => haggle.ask(SET, metaData(lab.unknownName(), [BASE_ALLOCATION]))),
  ),
  must('C1', 'SET_META_CONTEXT that is malformed takes back an earlier one', (lab) =>
    setAndHas(lab, Errno.EINVAL, (haggle) => haggle.refused(SET, Buffer.alloc(3))),
  ),
  must('C1', 'SET_META_CONTEXT replaces an earlier one by another', async (lab) => {
    const haggle = await haggled(lab);
    await haggle.contexts(SET, lab.name, []);
    await haggle.contexts(SET, lab.name, [BASE_ALLOCATION]);
    assert.equal(await statusAfter(lab, haggle), Errno.OK);
  }),
];

export const contextCases = [...listCases, ...setCases, ...malformedCases];
