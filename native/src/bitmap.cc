#include "bitmap.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace blockferry {
namespace {

constexpr size_t kWordBytes = sizeof(uint64_t);

// The word whose bit 0 is the map's bit `byte * 8`.
inline uint64_t load(const uint8_t* at, size_t bytes = kWordBytes) {
  uint64_t word = 0;
  std::memcpy(&word, at, bytes);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  return word;
}

__attribute__((always_inline)) inline uint64_t countBytesBody(const uint8_t* at, size_t bytes) {
  uint64_t sums[4] = {};
  size_t i = 0;
  for (; i + 4 * kWordBytes <= bytes; i += 4 * kWordBytes) {
    for (size_t lane = 0; lane < 4; lane++) {
      sums[lane] += static_cast<uint64_t>(__builtin_popcountll(load(at + i + lane * kWordBytes)));
    }
  }
  uint64_t sum = sums[0] + sums[1] + sums[2] + sums[3];
  for (; i + kWordBytes <= bytes; i += kWordBytes) sum += static_cast<uint64_t>(__builtin_popcountll(load(at + i)));
  if (i < bytes) sum += static_cast<uint64_t>(__builtin_popcountll(load(at + i, bytes - i)));
  return sum;
}

uint64_t countBytesPlain(const uint8_t* at, size_t bytes) { return countBytesBody(at, bytes); }

#if defined(__x86_64__)
// Baseline x86-64 counts bits by table, four times as slow as the instruction nearly every machine has.
__attribute__((target("popcnt"))) uint64_t countBytesPopcnt(const uint8_t* at, size_t bytes) {
  return countBytesBody(at, bytes);
}

const bool hasPopcnt = [] {
  __builtin_cpu_init();
  return __builtin_cpu_supports("popcnt") != 0;
}();

inline uint64_t countBytes(const uint8_t* at, size_t bytes) {
  return hasPopcnt ? countBytesPopcnt(at, bytes) : countBytesPlain(at, bytes);
}
#else
inline uint64_t countBytes(const uint8_t* at, size_t bytes) { return countBytesPlain(at, bytes); }
#endif

// A range as whole bytes between two partly covered ones. A mask of 0: no such byte; then it must not be
// touched, it may lie behind the map.
struct Parts {
  size_t headByte;
  uint8_t headMask;
  size_t wholeFrom;
  size_t wholeBytes;
  size_t tailByte;
  uint8_t tailMask;
};

Parts split(uint64_t from, uint64_t to) {
  const size_t first = from >> 3;
  const size_t last = to >> 3;
  const uint8_t above = static_cast<uint8_t>(0xff << (from & 7));
  const uint8_t below = static_cast<uint8_t>((1u << (to & 7)) - 1);
  if (first == last) return {first, static_cast<uint8_t>(above & below), first, 0, first, 0};
  const bool partial = (from & 7) != 0;
  const size_t wholeFrom = partial ? first + 1 : first;
  return {first, partial ? above : uint8_t{0}, wholeFrom, last - wholeFrom, last, below};
}

inline int onesUnder(const uint8_t* map, size_t byte, uint8_t mask) {
  return mask == 0 ? 0 : std::popcount(static_cast<uint8_t>(map[byte] & mask));
}

// `flip`: all ones to look for a zero, 0 to look for a one.
inline uint64_t next(const uint8_t* map, uint64_t from, uint64_t to, uint64_t flip) {
  if (from >= to) return to;
  const size_t bytes = (to + 7) >> 3;
  size_t byte = from >> 3;
  uint64_t wanted = ~uint64_t{0} << (from & 7);
  for (; byte + kWordBytes <= bytes; byte += kWordBytes) {
    const uint64_t word = (load(map + byte) ^ flip) & wanted;
    if (word != 0) return std::min<uint64_t>(to, byte * 8 + static_cast<uint64_t>(std::countr_zero(word)));
    wanted = ~uint64_t{0};
  }
  if (byte >= bytes) return to;
  // What is missing of the last word shows up behind `to`, if at all.
  const uint64_t word = (load(map + byte, bytes - byte) ^ flip) & wanted;
  return word == 0 ? to : std::min<uint64_t>(to, byte * 8 + static_cast<uint64_t>(std::countr_zero(word)));
}

}  // namespace

uint64_t countOnes(const uint8_t* map, uint64_t from, uint64_t to) {
  const Parts parts = split(from, to);
  uint64_t sum = static_cast<uint64_t>(onesUnder(map, parts.headByte, parts.headMask) +
                                       onesUnder(map, parts.tailByte, parts.tailMask));
  if (parts.wholeBytes > 0) sum += countBytes(map + parts.wholeFrom, parts.wholeBytes);
  return sum;
}

uint64_t nextZero(const uint8_t* map, uint64_t from, uint64_t to) { return next(map, from, to, ~uint64_t{0}); }

uint64_t nextOne(const uint8_t* map, uint64_t from, uint64_t to) { return next(map, from, to, 0); }

uint64_t setRange(uint8_t* map, uint64_t from, uint64_t to) {
  const uint64_t changed = to - from - countOnes(map, from, to);
  // Nothing to do: leaves the pages of a shared map clean.
  if (changed == 0) return 0;
  const Parts parts = split(from, to);
  if (parts.headMask != 0) map[parts.headByte] |= parts.headMask;
  if (parts.wholeBytes > 0) std::memset(map + parts.wholeFrom, 0xff, parts.wholeBytes);
  if (parts.tailMask != 0) map[parts.tailByte] |= parts.tailMask;
  return changed;
}

uint64_t clearRange(uint8_t* map, uint64_t from, uint64_t to) {
  const uint64_t changed = countOnes(map, from, to);
  if (changed == 0) return 0;
  const Parts parts = split(from, to);
  if (parts.headMask != 0) map[parts.headByte] &= static_cast<uint8_t>(~parts.headMask);
  if (parts.wholeBytes > 0) std::memset(map + parts.wholeFrom, 0, parts.wholeBytes);
  if (parts.tailMask != 0) map[parts.tailByte] &= static_cast<uint8_t>(~parts.tailMask);
  return changed;
}

void orInto(uint8_t* map, const uint8_t* other, size_t bytes) {
  size_t at = 0;
  for (; at + 8 <= bytes; at += 8) {
    uint64_t more, mine;
    std::memcpy(&more, other + at, 8);
    if (more == 0) continue;
    std::memcpy(&mine, map + at, 8);
    if ((more & ~mine) == 0) continue;
    mine |= more;
    std::memcpy(map + at, &mine, 8);
  }
  for (; at < bytes; at++)
    if ((other[at] & ~map[at]) != 0) map[at] |= other[at];
}

}  // namespace blockferry
