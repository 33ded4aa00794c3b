// Numbers that follow from a seed.
#pragma once

#include <cstdint>

namespace blockferry::load {

// splitmix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
inline uint64_t mix(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(mix(seed)) {}

  uint64_t below(uint64_t bound) {
    state_ += 0x9e3779b97f4a7c15;
    return static_cast<uint64_t>((static_cast<unsigned __int128>(mix(state_)) * bound) >> 64);
  }

 private:
  uint64_t state_;
};

// A permutation of 0..count-1 that needs no memory: a Feistel network over the next even power of two, walked until
// it lands inside. No pattern that a read-ahead could find.
class Shuffle {
 public:
  Shuffle(uint64_t count, uint64_t seed) : count_(count), seed_(seed) {
    while (half_ < 31 && (uint64_t{1} << (2 * half_)) < count) half_++;
  }

  uint64_t at(uint64_t index) const {
    do index = permute(index);
    while (index >= count_);
    return index;
  }

 private:
  uint64_t permute(uint64_t value) const {
    const uint64_t mask = (uint64_t{1} << half_) - 1;
    uint64_t left = value >> half_;
    uint64_t right = value & mask;
    for (uint64_t round = 0; round < 4; round++) {
      const uint64_t next = left ^ (mix(seed_ + (round << 56) + right) & mask);
      left = right;
      right = next;
    }
    return (left << half_) | right;
  }

  uint64_t count_;
  uint64_t seed_;
  unsigned half_ = 1;
};

}  // namespace blockferry::load
