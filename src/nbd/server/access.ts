/**
 * Who may do what with an export. An export has a list of rules; the first one that fits a client says what it may do, and a client
 * that none fits may do nothing. An export without a list is everybody's to write.
 *
 *     RULE       GRADE[:CONDITION[,CONDITION]...]     every condition must hold; without any the rule fits everybody
 *     GRADE      none | read | write
 *     CONDITION  address=IP[/PREFIX]                  the client's address
 *                unix                                 it came over a unix socket, or stdio
 *                certificate=NAME                     common name of its verified certificate; * is any
 *                psk=NAME                             name of its key; * is any
 *
 * A comma in a NAME is written \, and a backslash \\. Pure: no sockets, no clock, no state.
 */
import type net from 'node:net';
import type { Duplex } from 'node:stream';
import { BlockferryError } from '../../errors.js';
import type { ServerTlsSettings } from '../tls.js';
import { contains, type IpAddress, type IpRange, parseIp, parseIpRange } from './ip-range.js';
import type { ClientIdentity } from './tls-acceptor.js';

/** none: the export is as unknown to the client; read: it is read-only; write: it is what it is. */
export type Grade = 'none' | 'read' | 'write';

/** Where a client came from. */
export type Origin = { readonly kind: 'ip'; readonly address: IpAddress } | { readonly kind: 'unix' };

export interface Client {
  readonly origin: Origin;
  /** Null without TLS, whatever the client claims to be. */
  readonly identity: ClientIdentity;
}

export interface AccessRule {
  readonly grade: Grade;
  /** Null: any. */
  readonly from: IpRange | 'unix' | null;
  /** Null: any, proven or not. A null name: any that is proven. */
  readonly identity: { readonly kind: 'x509' | 'psk'; readonly name: string | null } | null;
}

/** Rules one export may have. */
export const ACCESS_RULES_MAX = 256;

const GRADES: ReadonlySet<string> = new Set(['none', 'read', 'write'] satisfies Grade[]);

/** Parses RULE. Throws 'usage'. */
export function parseAccessRule(text: string): AccessRule {
  const [, grade, conditions] = /^(\w+)(?::(.*))?$/s.exec(text) ?? [];
  if (grade === undefined || !GRADES.has(grade))
    throw wrong(text, 'write GRADE or GRADE:CONDITION, where GRADE is none, read or write');
  const rule = { grade: grade as Grade, from: null, identity: null };
  return conditions === undefined
    ? rule
    : splitAtCommas(conditions).reduce<AccessRule>((known, word) => withCondition(known, word, text), rule);
}

function withCondition(rule: AccessRule, condition: string, text: string): AccessRule {
  const [, key, value] = /^([a-z]+)(?:=(.*))?$/s.exec(condition) ?? [];
  if ((key === 'unix') === (value !== undefined)) throw unknownCondition(text, condition);
  switch (key) {
    case 'unix':
    case 'address': {
      if (rule.from !== null) throw wrong(text, 'a client comes from one place: write a rule for each');
      return { ...rule, from: key === 'unix' ? 'unix' : checkedRange(value!, text) };
    }
    case 'certificate':
    case 'psk': {
      if (rule.identity !== null) throw wrong(text, 'a client proves one name: write a rule for each');
      if (value === '') throw wrong(text, `${key} wants a name, or * for any`);
      const kind = key === 'psk' ? 'psk' : 'x509';
      return { ...rule, identity: { kind, name: value === '*' ? null : value! } };
    }
    default:
      throw unknownCondition(text, condition);
  }
}

function checkedRange(word: string, text: string): IpRange {
  const parsed = parseIpRange(word);
  if (!parsed.ok) throw wrong(text, parsed.problem);
  return parsed.range;
}

/** The words between commas, where \, is a comma and \\ a backslash. */
function splitAtCommas(text: string): string[] {
  const words = [''];
  for (const [piece] of text.matchAll(/\\[\\,]|./gs)) {
    if (piece === ',') words.push('');
    else words[words.length - 1] += piece.length === 2 ? piece[1] : piece;
  }
  return words;
}

function unknownCondition(text: string, condition: string): BlockferryError {
  const known = 'address=IP[/PREFIX], unix, certificate=NAME or psk=NAME';
  return wrong(text, `${JSON.stringify(condition.slice(0, 64))} is no condition: write ${known}`);
}

function wrong(text: string, why: string): BlockferryError {
  return new BlockferryError('usage', `access rule ${JSON.stringify(text.slice(0, 128))}: ${why}`);
}

/** What `rules` let a client do. Undefined: there are none. */
export function gradeOf(rules: readonly AccessRule[] | undefined, { origin, identity }: Client): Grade {
  if (rules === undefined) return 'write';
  const fits = (rule: AccessRule) => fitsOrigin(rule, origin) && fitsIdentity(rule, identity);
  return rules.find(fits)?.grade ?? 'none';
}

/** Whether a client from there could do anything at all if it proved to be the right one. */
export function couldBeLetIn(rules: readonly AccessRule[] | undefined, origin: Origin): boolean {
  if (rules === undefined) return true;
  /** Names, and kinds of names, that a rule has turned away already. */
  const turnedAway = new Set<string>();
  for (const rule of rules) {
    if (!fitsOrigin(rule, origin)) continue;
    if (rule.identity === null) return rule.grade !== 'none';
    const { kind, name } = rule.identity;
    const named = `${kind} ${name}`;
    if (turnedAway.has(kind) || turnedAway.has(named)) continue;
    if (rule.grade !== 'none') return true;
    turnedAway.add(name === null ? kind : named);
  }
  return false;
}

function fitsOrigin({ from }: AccessRule, origin: Origin): boolean {
  if (from === null) return true;
  if (from === 'unix') return origin.kind === 'unix';
  return origin.kind === 'ip' && contains(from, origin.address);
}

function fitsIdentity(rule: AccessRule, identity: ClientIdentity): boolean {
  if (rule.identity === null) return true;
  if (identity === null || identity.kind !== rule.identity.kind) return false;
  return rule.identity.name === null || rule.identity.name === identity.name;
}

/**
 * Why a rule can never fit under these TLS settings, or undefined. Rules that wait for a name nobody can prove are a mistake, and
 * one that keeps everybody out, or lets them in.
 */
export function unprovable(
  rules: readonly AccessRule[],
  tls: Pick<ServerTlsSettings, 'certificates' | 'pskFile' | 'verifyPeer'> | undefined,
): 'certificate' | 'psk' | undefined {
  const proves = {
    x509: tls?.certificates !== undefined && tls.verifyPeer === true,
    psk: tls?.pskFile !== undefined,
  };
  const kind = rules.find(({ identity }) => identity !== null && !proves[identity.kind])?.identity?.kind;
  return kind === 'x509' ? 'certificate' : kind;
}

/** Where a connection comes from; undefined: its peer is gone already, and cannot be asked any more. */
export function originOf(socket: Duplex | net.Socket): Origin | undefined {
  // A pipe has neither, a unix socket no addresses; a socket of TCP keeps its own one when the peer is gone.
  const { remoteAddress, localAddress } = socket as Partial<net.Socket>;
  if (remoteAddress === undefined) return localAddress === undefined ? { kind: 'unix' } : undefined;
  const address = parseIp(remoteAddress);
  return address === undefined ? undefined : { kind: 'ip', address };
}
