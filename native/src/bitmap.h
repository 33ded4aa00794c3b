// Bitmaps: bit i is bit i & 7 (least significant first) of byte i >> 3. Ranges [from, to) are bits; callers
// have checked that from <= to and that the map has `to` bits. No alignment is asked of the map.
#pragma once

#include <cstddef>
#include <cstdint>

namespace blockferry {

uint64_t countOnes(const uint8_t* map, uint64_t from, uint64_t to);
// First bit of that value in the range, or `to`.
uint64_t nextZero(const uint8_t* map, uint64_t from, uint64_t to);
uint64_t nextOne(const uint8_t* map, uint64_t from, uint64_t to);
// Answer how many bits were changed.
uint64_t setRange(uint8_t* map, uint64_t from, uint64_t to);
uint64_t clearRange(uint8_t* map, uint64_t from, uint64_t to);
// Sets in `map` the bits that are set in `other`, of `bytes` bytes each. Memory that has nothing to gain is not written.
void orInto(uint8_t* map, const uint8_t* other, size_t bytes);

}  // namespace blockferry
