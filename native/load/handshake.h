// From an address to a connection in the transmission phase.
#pragma once

#include <cstdint>

#include "options.h"

namespace blockferry::load {

struct Export {
  uint64_t sizeBytes = 0;
  uint16_t flags = 0;
  uint32_t blockBytesMin = 1;
  uint32_t blockBytesMax = 32 << 20;
  bool structured = false;
};

// A connected blocking socket that gives up after the options' timeout; TCP sends at once (TCP_NODELAY).
int connectTo(const Options& options);

Export negotiate(int fd, const Options& options);

}  // namespace blockferry::load
