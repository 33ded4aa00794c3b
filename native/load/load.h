// The load: keeps `depth` requests under way on each connection and counts what comes back.
//
// Three phases: warming up (nothing counts), measuring, and draining (what is under way comes back and does not count). With a count or a
// lap there is no warm-up and everything counts. With verification a fourth one reads every block back that was written.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "connection.h"
#include "handshake.h"
#include "histogram.h"
#include "options.h"
#include "random.h"
#include "verifier.h"

namespace blockferry::load {

struct Report {
  int64_t elapsedNs = 0;
  int64_t cpuNs = 0;
  uint64_t reads = 0;
  uint64_t writes = 0;
  uint64_t flushes = 0;
  uint64_t bytes = 0;
  Histogram readNs;
  Histogram writeNs;
  Histogram flushNs;
  // All requests from the first to the last.
  uint64_t totalReads = 0;
  uint64_t totalWrites = 0;
  uint64_t totalFlushes = 0;
  uint64_t verifiedReads = 0;
};

class Load {
 public:
  // Connects; fails if the export does not fit the options.
  explicit Load(const Options& options);
  Report run();
  const Export& target() const { return export_; }
  void disconnect();

 private:
  enum class Phase { kWarmup, kMeasure, kDrain, kReadBack };
  // A connection, and what only it knows of the load.
  struct Lane {
    Connection connection;
    uint64_t blockFirst;  // its part of the range in a sequential load
    uint64_t blockEnd;
    uint64_t next;
    uint32_t unflushed = 0;
    bool waitsToSend = false;
  };

  void checkExport();
  void work();
  void waitAny();
  void waitSingle();
  void pump(Lane& lane);
  bool issue(Lane& lane, int64_t now);
  bool choose(Lane& lane, Slot& slot);
  bool chooseBlock(Lane& lane, uint64_t& block);
  bool chooseForReadBack(Slot& slot);
  void received(Lane& lane);
  void advance(int64_t now);
  void endMeasuring(int64_t at);
  void count(const Slot& slot, int64_t now);
  void watch(Lane& lane, bool sending);

  Options options_;
  Export export_;
  uint64_t blocks_ = 0;
  Random random_;
  std::optional<Shuffle> shuffle_;
  std::optional<Verifier> verifier_;
  std::vector<uint8_t> payload_;  // of all writes that are not verified
  std::vector<uint8_t> memory_;   // of all slots, when verified
  std::vector<Lane> lanes_;
  int epoll_ = -1;
  std::vector<Slot*> finished_;
  Phase phase_ = Phase::kWarmup;
  uint64_t issued_ = 0;
  uint64_t shuffled_ = 0;
  uint64_t readBackNext_ = 0;
  uint32_t underWay_ = 0;
  int64_t measureFromNs_ = 0;
  int64_t measureUntilNs_ = 0;  // INT64_MAX: by count or lap alone
  int64_t lastNs_ = 0;
  int64_t cpuFromNs_ = 0;
  Report report_;
};

}  // namespace blockferry::load
