import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { contains, type IpRange, parseIp, parseIpRange } from '../../../src/nbd/server/ip-range.js';

function range(text: string): IpRange {
  const parsed = parseIpRange(text);
  assert.ok(parsed.ok, text);
  return parsed.range;
}

describe('addresses', () => {
  test('IPv4', () => {
    assert.deepEqual(parseIp('10.1.2.255'), { bits: 32, value: 0x0a0102ffn });
    assert.deepEqual(parseIp('0.0.0.0'), { bits: 32, value: 0n });
  });

  test('IPv6, however it is written', () => {
    const value = 0x2001_0db8_0000_0000_0000_0000_0000_0001n;
    for (const text of ['2001:db8::1', '2001:DB8:0:0:0:0:0:1', '2001:db8:0::0:1', '2001:0db8::0.0.0.1'])
      assert.deepEqual(parseIp(text), { bits: 128, value }, text);
    assert.deepEqual(parseIp('::'), { bits: 128, value: 0n });
    assert.deepEqual(parseIp('::1'), { bits: 128, value: 1n });
    assert.deepEqual(parseIp('fe80::'), { bits: 128, value: 0xfe80n << 112n });
    assert.deepEqual(parseIp('1:2:3:4:5:6:7::'), {
      bits: 128,
      value: 0x1_0002_0003_0004_0005_0006_0007_0000n,
    });
  });

  test('IPv4 in the clothes of IPv6 is IPv4', () => {
    for (const text of ['::ffff:10.1.2.3', '::ffff:a01:203', '0:0:0:0:0:FFFF:0a01:0203'])
      assert.deepEqual(parseIp(text), parseIp('10.1.2.3'), text);
    assert.equal(parseIp('::10.1.2.3')?.bits, 128);
  });

  test('a zone does not count', () => {
    assert.deepEqual(parseIp('fe80::1%eth0'), parseIp('fe80::1'));
  });

  test('what is none', () => {
    for (const text of [
      '',
      '10.1.2',
      '10.1.2.256',
      '010.1.2.3',
      'localhost',
      '::1::',
      '10.1.2.3/8',
      '[::1]',
      '1%2',
    ])
      assert.equal(parseIp(text), undefined, text);
  });
});

describe('ranges', () => {
  const cases: [text: string, inside: string[], outside: string[]][] = [
    ['10.1.2.3', ['10.1.2.3', '::ffff:10.1.2.3'], ['10.1.2.2', '::10.1.2.3', '::1']],
    ['10.0.0.0/8', ['10.0.0.0', '10.255.255.255', '::ffff:a00:1'], ['9.255.255.255', '11.0.0.0']],
    ['10.1.2.128/25', ['10.1.2.128', '10.1.2.255'], ['10.1.2.127', '10.1.3.128']],
    ['0.0.0.0/0', ['1.2.3.4', '::ffff:1.2.3.4'], ['::', '::1', '2001:db8::1']],
    ['::/0', ['::', '2001:db8::1', '::1.2.3.4'], ['1.2.3.4', '::ffff:1.2.3.4']],
    ['2001:db8::/32', ['2001:db8:ffff::1'], ['2001:db9::', '32.1.13.184']],
    ['2001:db8::/33', ['2001:db8:7fff::1'], ['2001:db8:8000::']],
    ['::1', ['::1'], ['::', '127.0.0.1', '0.0.0.1']],
    ['::ffff:10.0.0.0/104', ['10.200.0.1'], ['11.0.0.1']],
    ['::ffff:0:0/96', ['1.2.3.4'], ['::']],
  ];
  for (const [text, inside, outside] of cases)
    test(text, () => {
      for (const word of inside) assert.ok(contains(range(text), parseIp(word)!), word);
      for (const word of outside) assert.ok(!contains(range(text), parseIp(word)!), word);
    });

  const refused: [text: string, why: RegExp][] = [
    ['', /address is due/],
    ['host-a', /address is due/],
    ['10.0.0.0/', /a number from 0 to 32/],
    ['10.0.0.0/33', /a number from 0 to 32/],
    ['10.0.0.0/08', /a number from 0 to 32/],
    ['10.0.0.0/-1', /a number from 0 to 32/],
    ['10.0.0.0/8/8', /a number from 0 to 32/],
    ['::/129', /a number from 0 to 128/],
    ['fe80::1%eth0', /address is due/],
    ['10.0.0.1/8', /write 10\.0\.0\.0\/8, or 10\.0\.0\.1 without a prefix/],
    ['2001:db8::1/32', /write 2001:db8:0:0:0:0:0:0\/32/],
    ['::ffff:10.0.0.0/64', /write a network of IPv4 addresses as such/],
  ];
  for (const [text, why] of refused)
    test(`refused: ${JSON.stringify(text)}`, () => {
      const parsed = parseIpRange(text);
      assert.ok(!parsed.ok);
      assert.match(parsed.problem, why);
    });
});
