// Latencies in nanoseconds, in buckets of 1/64 of an octave: quantiles are at most 1.6 % too high. The greatest is exact.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace blockferry::load {

class Histogram {
 public:
  void add(int64_t ns) {
    const uint64_t value = ns < 0 ? 0 : static_cast<uint64_t>(ns);
    counts_[bucketOf(value)]++;
    total_++;
    sum_ += value;
    max_ = std::max(max_, value);
  }

  void add(const Histogram& other) {
    for (size_t bucket = 0; bucket < counts_.size(); bucket++) counts_[bucket] += other.counts_[bucket];
    total_ += other.total_;
    sum_ += other.sum_;
    max_ = std::max(max_, other.max_);
  }

  void clear() { *this = Histogram(); }

  uint64_t total() const { return total_; }
  uint64_t max() const { return max_; }
  uint64_t mean() const { return total_ == 0 ? 0 : sum_ / total_; }

  // What `share` (0..1) of all did not exceed; 0 if there were none.
  uint64_t quantile(double share) const {
    const auto wanted = static_cast<uint64_t>(share * static_cast<double>(total_));
    uint64_t seen = 0;
    for (size_t bucket = 0; bucket < counts_.size(); bucket++) {
      seen += counts_[bucket];
      if (seen > wanted) return std::min(max_, endOf(bucket));
    }
    return max_;
  }

 private:
  static constexpr unsigned kSubBits = 6;
  static constexpr uint64_t kSub = 1 << kSubBits;
  static constexpr unsigned kExponentMax = 40;  // 2^40 ns: 18 min

  static size_t bucketOf(uint64_t value) {
    if (value < kSub) return value;
    const auto exponent = static_cast<unsigned>(std::bit_width(value) - 1);
    if (exponent > kExponentMax) return (kExponentMax - kSubBits + 2) * kSub - 1;
    const uint64_t within = (value >> (exponent - kSubBits)) & (kSub - 1);
    return (exponent - kSubBits + 1) * kSub + within;
  }

  static uint64_t endOf(size_t bucket) {
    if (bucket < kSub) return bucket;
    const unsigned shift = bucket / kSub - 1;
    return ((kSub + bucket % kSub + 1) << shift) - 1;
  }

  std::vector<uint64_t> counts_ = std::vector<uint64_t>((kExponentMax - kSubBits + 2) * kSub);
  uint64_t total_ = 0;
  uint64_t sum_ = 0;
  uint64_t max_ = 0;
};

}  // namespace blockferry::load
