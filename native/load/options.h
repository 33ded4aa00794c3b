// The words of this program: `--NAME VALUE` pairs, which src/bench/load.ts writes. See `parseOptions` for the names.
#pragma once

#include <cstdint>
#include <string>

namespace blockferry::load {

enum class Order {
  kRandom,      // any block, again and again
  kShuffled,    // each block once a lap, in random order
  kSequential,  // each connection goes through a part of its own
};

constexpr uint32_t kConnectionsMax = 256;
constexpr uint32_t kDepthMax = 1024;
constexpr uint32_t kBlockBytesMax = 32 << 20;  // what every server must take (doc/proto.md, "Size constraints")

struct Options {
  std::string unixPath;  // of a unix socket, or:
  std::string host;
  std::string port;
  std::string exportName;
  uint32_t connections = 1;
  uint32_t depth = 1;  // requests under way on each connection
  uint32_t blockBytes = 4096;
  Order order = Order::kRandom;
  uint32_t readPercent = 100;
  uint32_t flushEvery = 0;  // writes of a connection; 0: never
  uint64_t warmupMs = 0;
  uint64_t durationMs = 1000;  // 0: by count or lap alone
  uint64_t count = 0;          // operations; 0: no limit
  uint64_t seed = 1;
  uint64_t offset = 0;
  uint64_t length = 0;  // 0: to the end of the export
  uint64_t strideBytes = 0;  // from one block to the next; 0: blockBytes
  uint64_t timeoutMs = 30000;
  bool lap = false;         // stop when each block was done once
  bool verify = false;      // see verifier.h
  bool structured = false;  // ask for structured replies
  bool hold = false;        // stay connected after the result is out, until stdin ends
};

Options parseOptions(int count, char** words);

}  // namespace blockferry::load
