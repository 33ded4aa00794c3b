// Requests of a client carried out one after the other, without leaving for JavaScript in between: READs and WRITEs of bytes that are
// here, with nothing special about them. No N-API here, no socket, no state.
//
// Invariants
// - What is not plainly such a request stops the batch before it, untouched: the TypeScript session (src/nbd/server) sees it as if it were
//   the first one. Every rule, refusal and error is the session's; here is only what always succeeds. What did not succeed all the same
//   (a read cut short, a failed write) is left to be done again there.
// - A READ's reply is whole, or nothing of it is there.
// - Bits of presence are read, never set: a WRITE that would make a block present is the session's.
// - Bits of the dirty map are set before the WRITE they tell of: whoever is killed in between has told too much, never too little.
// - What was carried out here, and only that, is counted here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heat.h"

namespace blockferry {

enum class Form : uint32_t { kSimple = 0, kStructured = 1, kExtended = 2 };

// The device of a batch, as it is while the batch runs.
struct Target {
  int fd;
  uint64_t bytes;           // offset + length of a request is at most this
  bool reads;               // READs may be carried out
  bool writes;
  bool nowait;              // reads only what is in the page cache (RWF_NOWAIT)
  uint32_t readBytesMax;    // longer ones are not ours
  uint32_t writeBytesMax;
  const uint8_t* present;   // bit i: block i of 4 KiB is here; nullptr: all are
  uint64_t presentBytes;    // of the bitmap
  Heat heat;                // of `bytes` at least
  uint8_t* dirty;           // a WRITE sets the bits of the blocks it touches, before it changes them; nullptr: none are kept
  uint64_t dirtyBytes;      // of the bitmap; a WRITE beyond it is not ours
};

enum class Stop : uint32_t {
  kEmpty,    // all was carried out
  kPartial,  // what is left begins a request that is ours as far as can be seen, and has not come whole
  kFull,     // no room for the next reply, or enough of them
  kOther,    // the next request is not ours
  kCold,     // the next request is a READ of bytes that are not in the page cache
  kHeldUp,   // the kernel made the last WRITE wait
};

struct Batch {
  size_t consumed;  // bytes of `in`
  size_t produced;  // bytes of `out`
  Stop stop;
  size_t writeBytes;  // of the last request that was looked at, header and payload, if it is a WRITE of ours; else 0
};

// Stops with kFull once there are `repliesMax` of them; 0: as many as there is room for.
Batch execute(const Target& target, Form form, const uint8_t* in, size_t inBytes, uint8_t* out, size_t outBytes,
              size_t repliesMax);

}  // namespace blockferry
