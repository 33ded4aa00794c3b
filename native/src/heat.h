// Counts a request in the heat of its volume, as src/volume/heat.ts does, whose head says what the bytes mean: a READ or WRITE that was carried
// out raises the level of each region it touched, with probability 2^-level. The same dice, in the same order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace blockferry {

struct Heat {
  uint8_t* bytes;  // head and regions; nullptr: nothing is counted
};

constexpr size_t kHeatHeadBytes = 8;  // dice, requests counted: 32 bits each
constexpr unsigned kHeatRegionBits = 18;
constexpr unsigned kHeatReadShift = 0;
constexpr unsigned kHeatWriteShift = 4;
constexpr unsigned kHeatLevelMax = 15;

// Bytes that a device of `deviceBytes` needs.
constexpr uint64_t heatBytes(uint64_t deviceBytes) {
  return kHeatHeadBytes + ((deviceBytes + (uint64_t{1} << kHeatRegionBits) - 1) >> kHeatRegionBits);
}

// True once in 2^level.
inline bool throwsDice(uint8_t* bytes, unsigned level) {
  uint32_t dice;
  std::memcpy(&dice, bytes, sizeof dice);
  dice ^= dice << 13;
  dice ^= dice >> 17;
  dice ^= dice << 5;
  std::memcpy(bytes, &dice, sizeof dice);
  return (dice & ((1u << level) - 1)) == 0;
}

// [offset, offset + length) lies within the device; length >= 1.
inline void countHeat(const Heat& heat, uint64_t offset, uint64_t length, unsigned shift) {
  if (heat.bytes == nullptr) return;
  const uint64_t last = (offset + length - 1) >> kHeatRegionBits;
  for (uint64_t region = offset >> kHeatRegionBits; region <= last; region++) {
    uint8_t& both = heat.bytes[kHeatHeadBytes + region];
    const unsigned level = (both >> shift) & kHeatLevelMax;
    if (level == 0 || (level < kHeatLevelMax && throwsDice(heat.bytes, level)))
      both = static_cast<uint8_t>(both + (1u << shift));
  }
  uint32_t counted;
  std::memcpy(&counted, heat.bytes + 4, sizeof counted);
  counted++;
  std::memcpy(heat.bytes + 4, &counted, sizeof counted);
}

}  // namespace blockferry
