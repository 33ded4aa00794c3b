// Whether a server gives back what was written to it. Each block has a generation: how often it was written. Its content follows
// from seed, offset and generation, so that data that is torn, stale, lost or of another place is seen. A block is part of one request at
// a time; one that was not written yet is written before it is read.
#pragma once

#include <cstdint>
#include <vector>

#include "connection.h"
#include "options.h"

namespace blockferry::load {

class Verifier {
 public:
  Verifier(const Options& options, uint64_t blocks);

  bool isBusy(uint64_t block) const { return busy_[block]; }
  uint32_t generationOf(uint64_t block) const { return generations_[block]; }
  // The slot's request is about to go; for a WRITE its memory is filled with the next generation.
  void begin(Slot& slot);
  // Its reply is here; for a READ it must hold what was written. Fails otherwise.
  void end(const Slot& slot);
  uint64_t verified() const { return verified_; }

 private:
  uint64_t blockOf(const Slot& slot) const { return (slot.offset - offset_) / strideBytes_; }
  uint64_t word(uint64_t at, uint32_t generation) const;
  [[noreturn]] void differs(const Slot& slot, uint32_t at, uint64_t found) const;

  uint64_t seed_;
  uint64_t offset_;
  uint64_t strideBytes_;
  std::vector<uint32_t> generations_;
  std::vector<bool> busy_;
  uint64_t verified_ = 0;
};

}  // namespace blockferry::load
