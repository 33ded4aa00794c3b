#include "verifier.h"

#include <algorithm>
#include <cstring>

#include "fail.h"
#include "random.h"
#include "wire.h"

namespace blockferry::load {
namespace {

constexpr uint32_t kWordBytes = sizeof(uint64_t);

}  // namespace

Verifier::Verifier(const Options& options, uint64_t blocks)
    : seed_(mix(options.seed)),
      offset_(options.offset),
      strideBytes_(options.strideBytes),
      generations_(blocks),
      busy_(blocks) {}

uint64_t Verifier::word(uint64_t at, uint32_t generation) const {
  return mix(seed_ ^ at ^ (uint64_t{generation} << 40));
}

void Verifier::begin(Slot& slot) {
  const uint64_t block = blockOf(slot);
  busy_[block] = true;
  slot.generation = generations_[block];
  if (slot.command == kRead) {
    // What an earlier reply left there must not pass for this one.
    std::memset(slot.memory, 0, slot.length);
    return;
  }
  slot.generation++;
  for (uint32_t at = 0; at < slot.length; at += kWordBytes) {
    const uint64_t value = word(slot.offset + at, slot.generation);
    std::memcpy(slot.memory + at, &value, kWordBytes);
  }
}

void Verifier::end(const Slot& slot) {
  const uint64_t block = blockOf(slot);
  busy_[block] = false;
  if (slot.command == kWrite) {
    generations_[block] = slot.generation;
    return;
  }
  for (uint32_t at = 0; at < slot.length; at += kWordBytes) {
    uint64_t found;
    std::memcpy(&found, slot.memory + at, kWordBytes);
    if (found != word(slot.offset + at, slot.generation)) differs(slot, at, found);
  }
  verified_++;
}

void Verifier::differs(const Slot& slot, uint32_t at, uint64_t found) const {
  const uint64_t offset = slot.offset + at;
  const char* what = found == 0 ? "zeros" : "other data";
  // The last few generations are what a server that forgets would show.
  for (uint32_t age = 1; age <= std::min<uint32_t>(slot.generation, 64); age++)
    if (found == word(offset, slot.generation - age)) what = "older data";
  fail("the server gave %s at offset %llu, not what was written there: the block at %llu was written %u times", what,
       static_cast<unsigned long long>(offset), static_cast<unsigned long long>(slot.offset), slot.generation);
}

}  // namespace blockferry::load
