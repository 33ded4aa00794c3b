/**
 * IP addresses as numbers, and ranges of them. An IPv4 address in IPv6's clothes (::ffff:10.0.0.1, what a dual-stack socket
 * calls an IPv4 client) is that IPv4 address, and nothing else: it is in no range of IPv6 addresses.
 */
import { isIPv4, isIPv6 } from 'node:net';

export interface IpAddress {
  /** 32: IPv4; 128: IPv6. */
  readonly bits: 32 | 128;
  /** Below 2 to the power of `bits`. */
  readonly value: bigint;
}

/** All addresses that begin with the first `prefix` bits of `value`. Bits behind them are 0. */
export interface IpRange extends IpAddress {
  /** 0 to `bits`. */
  readonly prefix: number;
}

/** What an IPv4 address looks like as an IPv6 address: RFC 4291, section 2.5.5.2. */
const MAPPED_PREFIX = 0xffffn;
const MAPPED_PREFIX_BITS = 96;

/** Parses an address; the zone of a link-local one (fe80::1%eth0) does not count. Undefined: it is none. */
export function parseIp(text: string): IpAddress | undefined {
  if (isIPv4(text)) return { bits: 32, value: ipv4Value(text) };
  if (!isIPv6(text)) return undefined;
  const value = ipv6Value(text.replace(/%.*$/, ''));
  return value >> 32n === MAPPED_PREFIX ? { bits: 32, value: value & 0xffff_ffffn } : { bits: 128, value };
}

/** Parses `ADDRESS` or `ADDRESS/PREFIX`. `problem` says what is wrong with it, and what to write instead. */
export function parseIpRange(text: string): { ok: true; range: IpRange } | { ok: false; problem: string } {
  const [, word = '', prefixWord] = /^([^/]*)(?:\/(.*))?$/s.exec(text) ?? [];
  const address = word.includes('%') ? undefined : parseIp(word);
  if (address === undefined)
    return { ok: false, problem: 'an IPv4 or IPv6 address is due, with /PREFIX for a network' };
  // What was written as IPv6 counts its bits from IPv6's front.
  const written = isIPv6(word) ? 128 : 32;
  if (prefixWord !== undefined && !/^(0|[1-9]\d{0,2})$/.test(prefixWord))
    return { ok: false, problem: `the prefix is a number from 0 to ${written}` };
  const length = prefixWord === undefined ? written : Number(prefixWord);
  if (length > written) return { ok: false, problem: `the prefix is a number from 0 to ${written}` };
  const prefix = written === address.bits ? length : length - MAPPED_PREFIX_BITS;
  if (prefix < 0) return { ok: false, problem: 'write a network of IPv4 addresses as such' };
  const first = leading(address, prefix) << BigInt(address.bits - prefix);
  if (first !== address.value) {
    const network = `${format({ ...address, value: first })}/${prefix}`;
    return {
      ok: false,
      problem: `${word} is one address inside a network: write ${network}, or ${word} without a prefix`,
    };
  }
  return { ok: true, range: { ...address, prefix } };
}

export function contains(range: IpRange, address: IpAddress): boolean {
  return range.bits === address.bits && leading(range, range.prefix) === leading(address, range.prefix);
}

function leading({ bits, value }: IpAddress, prefix: number): bigint {
  return value >> BigInt(bits - prefix);
}

function ipv4Value(text: string): bigint {
  return text.split('.').reduce((value, byte) => (value << 8n) | BigInt(byte), 0n);
}

/** `text` is a valid IPv6 address without a zone. */
function ipv6Value(text: string): bigint {
  const dotted = /^(.*:)([^:]*\..*)$/.exec(text);
  const hex = dotted === null ? text : dotted[1]! + groupsOf(ipv4Value(dotted[2]!), 2);
  const [front, back] = hex.split('::').map((part) => (part === '' ? [] : part.split(':')));
  const end = back ?? [];
  const zeros = Array.from({ length: 8 - front!.length - end.length }, () => '0');
  return [...front!, ...zeros, ...end].reduce((value, group) => (value << 16n) | BigInt(`0x${group}`), 0n);
}

function format({ bits, value }: IpAddress): string {
  if (bits === 128) return groupsOf(value, 8);
  return [24n, 16n, 8n, 0n].map((shift) => (value >> shift) & 0xffn).join('.');
}

function groupsOf(value: bigint, count: number): string {
  return Array.from({ length: count }, (_, index) =>
    ((value >> BigInt(16 * (count - 1 - index))) & 0xffffn).toString(16),
  ).join(':');
}
