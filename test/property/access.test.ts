// Access rules against a model that writes everything out: addresses as strings of bits, rules from last to first. And what a client
// may not see against a server that does not have it: whatever the client asks, in whatever order, the bytes are the same.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import { Info, Option } from '../../src/nbd/constants.js';
import {
  type Client,
  couldBeLetIn,
  type Grade,
  gradeOf,
  parseAccessRule,
} from '../../src/nbd/server/access.js';
import { parseIp } from '../../src/nbd/server/ip-range.js';
import { VisibleExports } from '../../src/nbd/server/visible-exports.js';
import { Conversation, directory, entry, infoData, metaData, option } from '../support/handshake.js';

/** Few addresses and names, so that rules meet clients. */
interface Ip {
  version: 4 | 6;
  /** '0' and '1', 32 or 128 of them. */
  bits: string;
}
interface ClientFacts {
  from: 'unix' | Ip;
  /** An IPv4 client at a socket of IPv6. */
  mapped: boolean;
  who: { key: 'certificate' | 'psk'; name: string } | null;
}
interface RuleFacts {
  grade: Grade;
  from: 'unix' | (Ip & { prefix: number }) | null;
  who: { key: 'certificate' | 'psk'; name: string } | null;
}

const bits = (length: number) =>
  fc
    .tuple(fc.constantFrom('0', '1'), fc.uniqueArray(fc.nat(length - 1), { maxLength: 3 }))
    .map(([fill, flipped]) =>
      Array.from({ length }, (_, at) => (flipped.includes(at) ? String(1 - Number(fill)) : fill)).join(''),
    );
const ip: fc.Arbitrary<Ip> = fc.oneof(
  bits(32).map((text) => ({ version: 4 as const, bits: text })),
  bits(128).map((text) => ({ version: 6 as const, bits: text })),
);
const who = fc.record({
  key: fc.constantFrom('certificate' as const, 'psk' as const),
  name: fc.constantFrom('a', 'b', 'c, d', 'e\\', '\\,', 'x=y'),
});
const clientFacts: fc.Arbitrary<ClientFacts> = fc.record({
  from: fc.oneof(fc.constant('unix' as const), ip),
  mapped: fc.boolean(),
  who: fc.option(who),
});
const ruleFacts: fc.Arbitrary<RuleFacts> = fc.record({
  grade: fc.constantFrom<Grade>('none', 'read', 'write'),
  from: fc.oneof(
    fc.constantFrom('unix' as const, null),
    fc
      .tuple(ip, fc.nat(128))
      .map(([address, prefix]) => ({ ...address, prefix: Math.min(prefix, address.bits.length) })),
  ),
  who: fc.option(
    fc.oneof(
      who,
      fc.record({ key: fc.constantFrom('certificate' as const, 'psk' as const), name: fc.constant('*') }),
    ),
  ),
});

function ipText({ version, bits: text }: Ip): string {
  const width = version === 4 ? 8 : 16;
  const parts = text.match(new RegExp(`.{${width}}`, 'g'))!.map((part) => Number.parseInt(part, 2));
  return version === 4 ? parts.join('.') : parts.map((part) => part.toString(16)).join(':');
}

function ruleText({ grade, from, who: name }: RuleFacts): string {
  const conditions: string[] = [];
  if (from === 'unix') conditions.push('unix');
  else if (from !== null) {
    const network = from.bits.slice(0, from.prefix).padEnd(from.bits.length, '0');
    conditions.push(`address=${ipText({ ...from, bits: network })}/${from.prefix}`);
  }
  if (name !== null) conditions.push(`${name.key}=${name.name.replaceAll(/[\\,]/g, '\\$&')}`);
  return conditions.length === 0 ? grade : `${grade}:${conditions.join(',')}`;
}

function clientOf({ from, mapped, who: name }: ClientFacts): Client {
  const text = from === 'unix' ? '' : `${mapped && from.version === 4 ? '::ffff:' : ''}${ipText(from)}`;
  return {
    origin: from === 'unix' ? { kind: 'unix' } : { kind: 'ip', address: parseIp(text)! },
    identity: name === null ? null : { kind: name.key === 'psk' ? 'psk' : 'x509', name: name.name },
  };
}

/** The first 80 bits 0, the next 16 bits 1: such an IPv6 address means the IPv4 address in its last 32. */
const isMapped = ({ version, bits: text }: Ip) => version === 6 && /^0{80}1{16}/.test(text);

function modelGrade(rules: readonly RuleFacts[], client: ClientFacts): Grade {
  let grade: Grade = 'none';
  for (const rule of [...rules].reverse()) {
    const { from, who: name } = rule;
    const near =
      from === null ||
      (from === 'unix' && client.from === 'unix') ||
      (from !== 'unix' &&
        client.from !== 'unix' &&
        from.version === client.from.version &&
        client.from.bits.startsWith(from.bits.slice(0, from.prefix)));
    const known =
      name === null ||
      (client.who !== null &&
        client.who.key === name.key &&
        (name.name === '*' || name.name === client.who.name));
    if (near && known) grade = rule.grade;
  }
  return grade;
}

const unmapped = ({ from }: RuleFacts | ClientFacts) => from === null || from === 'unix' || !isMapped(from);

describe('access rules', () => {
  test('mean what the model says', () => {
    fc.assert(
      fc.property(
        fc.array(ruleFacts.filter(unmapped), { maxLength: 6 }),
        clientFacts.filter(unmapped),
        (rules, client) => {
          const parsed = rules.map(ruleText).map(parseAccessRule);
          assert.equal(
            gradeOf(parsed, clientOf(client)),
            modelGrade(rules, client),
            rules.map(ruleText).join(' '),
          );
        },
      ),
      { numRuns: 2000 },
    );
  });

  test('TLS could help a client exactly if some name would', () => {
    fc.assert(
      fc.property(
        fc.array(ruleFacts.filter(unmapped), { maxLength: 6 }),
        clientFacts.filter(unmapped),
        (rules, client) => {
          const names = [
            null,
            ...rules.map((rule) => rule.who),
            { key: 'psk' as const, name: 'nobody' },
            { key: 'certificate' as const, name: 'nobody' },
          ];
          const some = names.some((name) => modelGrade(rules, { ...client, who: name }) !== 'none');
          const parsed = rules.map(ruleText).map(parseAccessRule);
          assert.equal(couldBeLetIn(parsed, clientOf(client).origin), some, rules.map(ruleText).join(' '));
        },
      ),
      { numRuns: 2000 },
    );
  });

  test('are parsed or refused with a reason, whatever the words', () => {
    const word = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc
        .array(
          fc.constantFrom(
            'read',
            'none',
            ':',
            ',',
            '=',
            '/',
            '\\',
            'unix',
            'address',
            'psk',
            '*',
            '10.0.0.0',
            '::',
            '8',
            '%',
          ),
          { maxLength: 10 },
        )
        .map((parts) => parts.join('')),
    );
    fc.assert(
      fc.property(word, (text) => {
        try {
          parseAccessRule(text);
        } catch (error) {
          assert.equal((error as { code?: string }).code, 'usage');
        }
      }),
      { numRuns: 2000 },
    );
  });
});

test('an export that a client may not see is, whatever it asks, not there', () => {
  const name = fc.constantFrom('', 'secret', 'disk', 'data', 'nothing');
  const asked = fc.oneof(
    fc.constant(option(Option.LIST)),
    fc.constant(option(Option.STRUCTURED_REPLY)),
    fc
      .tuple(fc.constantFrom(Option.INFO, Option.GO), name)
      .map(([number, of]) => option(number, infoData(of, [Info.NAME]))),
    fc
      .tuple(fc.constantFrom(Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT), name)
      .map(([number, of]) => option(number, metaData(of, ['base:']))),
    name.map((of) => option(Option.EXPORT_NAME, Buffer.from(of))),
  );
  const rules = fc.constantFrom('read', 'write', 'read:address=10.0.0.0/8');
  const beside = fc.uniqueArray(fc.record({ name: fc.constantFrom('disk', 'data'), rule: rules }), {
    selector: (other) => other.name,
  });
  fc.assert(
    fc.property(beside, fc.array(asked, { maxLength: 40 }), (others, questions) => {
      const client = clientOf({ from: 'unix', mapped: false, who: null });
      const secret = entry('secret', {
        access: ['write:psk=alice', 'read:address=::/0'].map(parseAccessRule),
      });
      const talk = (hidden: boolean) => {
        const entries = others.map((other) => entry(other.name, { access: [parseAccessRule(other.rule)] }));
        if (hidden) entries.splice(1, 0, secret);
        const exports = new VisibleExports({ exports: directory(...entries), client, secure: false });
        const conversation = Conversation.begun(exports);
        const result = conversation.push(...questions);
        return { sent: conversation.sent(), result };
      };
      const [with_, without] = [talk(true), talk(false)];
      assert.deepEqual(with_.sent, without.sent);
      assert.equal(with_.result?.kind, without.result?.kind);
      assert.equal(secret.opened.length, 0);
    }),
    { numRuns: 500 },
  );
});
