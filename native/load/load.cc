#include "load.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "fail.h"
#include "wire.h"

namespace blockferry::load {
namespace {

constexpr uint64_t kVerifiedBlocksMax = uint64_t{1} << 26;
constexpr uint64_t kVerifyMemoryBytesMax = uint64_t{1} << 30;
constexpr int64_t kNsPerMs = 1000 * 1000;
constexpr int kEventsMax = 64;

int64_t clockNs(clockid_t clock) {
  timespec time;
  ::clock_gettime(clock, &time);
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

int64_t nowNs() { return clockNs(CLOCK_MONOTONIC); }
int64_t cpuNs() { return clockNs(CLOCK_PROCESS_CPUTIME_ID); }

}  // namespace

Load::Load(const Options& options) : options_(options), random_(options.seed) {
  const int first = connectTo(options_);
  export_ = negotiate(first, options_);
  checkExport();
  const size_t requests = size_t{options_.connections} * options_.depth;
  if (options_.verify) {
    verifier_.emplace(options_, blocks_);
    memory_.resize(requests * options_.blockBytes);
  } else {
    payload_.resize(options_.blockBytes);
    for (size_t at = 0; at < payload_.size(); at++) payload_[at] = static_cast<uint8_t>(mix(options_.seed + at));
  }
  if (options_.order == Order::kShuffled) shuffle_.emplace(blocks_, options_.seed);
  epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
  for (uint32_t index = 0; index < options_.connections; index++) {
    const int fd = index == 0 ? first : connectTo(options_);
    if (index > 0 && negotiate(fd, options_).sizeBytes != export_.sizeBytes)
      fail("the server's connections differ in the size of the export");
    uint8_t* memory =
        options_.verify ? &memory_[size_t{index} * options_.depth * options_.blockBytes] : nullptr;
    const uint64_t from = blocks_ * index / options_.connections;
    const uint64_t end = blocks_ * (index + 1) / options_.connections;
    lanes_.push_back({Connection(fd, options_.depth, export_.structured, memory, options_.blockBytes), from, end, from});
    epoll_event event = {};
    event.events = EPOLLIN;
    event.data.u32 = index;
    if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll: %s", std::strerror(errno));
  }
}

void Load::checkExport() {
  const uint64_t size = export_.sizeBytes;
  const bool writes = options_.readPercent < 100 || options_.verify;
  if (options_.offset > size || options_.length > size - options_.offset)
    fail("the export ends at %llu bytes, before the end of the range", static_cast<unsigned long long>(size));
  if (options_.length == 0) options_.length = size - options_.offset;
  blocks_ = options_.length < options_.blockBytes
                ? 0
                : (options_.length - options_.blockBytes) / options_.strideBytes + 1;
  if (blocks_ < options_.connections) fail("the range has too few blocks of %u bytes", options_.blockBytes);
  if (options_.blockBytes > export_.blockBytesMax || options_.blockBytes % export_.blockBytesMin != 0 ||
      options_.offset % export_.blockBytesMin != 0 || options_.strideBytes % export_.blockBytesMin != 0)
    fail("the server takes blocks of %u to %u bytes only", export_.blockBytesMin, export_.blockBytesMax);
  if (writes && (export_.flags & kFlagReadOnly) != 0) fail("the export is read-only");
  if (options_.flushEvery > 0 && (export_.flags & kFlagSendFlush) == 0) fail("the server does not offer FLUSH");
  if (!options_.verify) return;
  const uint64_t requests = uint64_t{options_.connections} * options_.depth;
  if (options_.blockBytes % sizeof(uint64_t) != 0) fail("verified blocks are a multiple of 8 bytes");
  if (blocks_ > kVerifiedBlocksMax || requests * options_.blockBytes > kVerifyMemoryBytesMax)
    fail("too much to remember: verify a smaller range, or with fewer requests under way");
  if (blocks_ < 4 * requests) fail("the range is too small to verify: it needs four blocks for each request under way");
  if (options_.connections > 1 && (export_.flags & kFlagMultiConn) == 0)
    fail("the server does not promise one content to several connections (CAN_MULTI_CONN): verify with one");
}

Report Load::run() {
  const int64_t start = nowNs();
  measureFromNs_ = start + static_cast<int64_t>(options_.warmupMs) * kNsPerMs;
  measureUntilNs_ = options_.durationMs == 0
                        ? INT64_MAX
                        : measureFromNs_ + static_cast<int64_t>(options_.durationMs) * kNsPerMs;
  advance(start);
  work();
  // By count or lap: the last reply is the end.
  if (phase_ != Phase::kDrain) endMeasuring(lastNs_);
  if (verifier_) {
    phase_ = Phase::kReadBack;
    work();
    report_.verifiedReads = verifier_->verified();
  }
  return report_;
}

void Load::work() {
  for (Lane& lane : lanes_) pump(lane);
  while (underWay_ > 0) {
    if (lanes_.size() == 1 && lanes_[0].connection.isSent()) waitSingle();
    else waitAny();
  }
}

// One connection and all sent: a receive that sleeps is one system call less.
void Load::waitSingle() {
  const int64_t since = nowNs();
  Lane& lane = lanes_[0];
  if (lane.connection.receive(true, finished_)) return received(lane);
  if (nowNs() - since >= static_cast<int64_t>(options_.timeoutMs) * kNsPerMs)
    fail("the server does not answer: %u requests under way for %llu ms", underWay_,
         static_cast<unsigned long long>(options_.timeoutMs));
}

void Load::waitAny() {
  epoll_event events[kEventsMax];
  const int count = ::epoll_wait(epoll_, events, kEventsMax, static_cast<int>(options_.timeoutMs));
  if (count == 0)
    fail("the server does not answer: %u requests under way for %llu ms", underWay_,
         static_cast<unsigned long long>(options_.timeoutMs));
  for (int index = 0; index < count; index++) {
    Lane& lane = lanes_[events[index].data.u32];
    if ((events[index].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0 && lane.connection.receive(false, finished_))
      received(lane);
    else if ((events[index].events & EPOLLOUT) != 0) pump(lane);
  }
}

void Load::received(Lane& lane) {
  const int64_t now = nowNs();
  advance(now);
  for (Slot* slot : finished_) {
    if (verifier_ && slot->command != kFlush) verifier_->end(*slot);
    count(*slot, now);
    lane.connection.giveBack(*slot);
  }
  underWay_ -= static_cast<uint32_t>(finished_.size());
  finished_.clear();
  lastNs_ = now;
  pump(lane);
}

// From phase to phase, by the clock.
void Load::advance(int64_t now) {
  if (phase_ == Phase::kWarmup && now >= measureFromNs_) {
    phase_ = Phase::kMeasure;
    measureFromNs_ = now;
    if (measureUntilNs_ != INT64_MAX) measureUntilNs_ = now + static_cast<int64_t>(options_.durationMs) * kNsPerMs;
    cpuFromNs_ = cpuNs();
  }
  if (phase_ == Phase::kMeasure && now >= measureUntilNs_) endMeasuring(measureUntilNs_);
}

void Load::endMeasuring(int64_t at) {
  phase_ = Phase::kDrain;
  report_.elapsedNs = std::max<int64_t>(1, at - measureFromNs_);
  report_.cpuNs = cpuNs() - cpuFromNs_;
}

void Load::count(const Slot& slot, int64_t now) {
  const bool measured = phase_ == Phase::kMeasure;
  if (phase_ == Phase::kReadBack) return;
  const int64_t ns = now - slot.queuedNs;
  if (slot.command == kFlush) {
    report_.totalFlushes++;
    if (!measured) return;
    report_.flushes++;
    report_.flushNs.add(ns);
    return;
  }
  const bool read = slot.command == kRead;
  (read ? report_.totalReads : report_.totalWrites)++;
  if (!measured) return;
  (read ? report_.reads : report_.writes)++;
  (read ? report_.readNs : report_.writeNs).add(ns);
  report_.bytes += slot.length;
}

// Issues what there is room for and sends it.
void Load::pump(Lane& lane) {
  if (phase_ != Phase::kDrain && lane.connection.hasRoom()) {
    const int64_t now = nowNs();
    while (lane.connection.hasRoom() && issue(lane, now)) underWay_++;
  }
  const bool sent = lane.connection.send();
  if (sent == lane.waitsToSend) watch(lane, !sent);
}

void Load::watch(Lane& lane, bool sending) {
  epoll_event event = {};
  event.events = EPOLLIN | (sending ? static_cast<uint32_t>(EPOLLOUT) : 0);
  event.data.u32 = static_cast<uint32_t>(&lane - lanes_.data());
  if (::epoll_ctl(epoll_, EPOLL_CTL_MOD, lane.connection.fd(), &event) != 0) fail("epoll: %s", std::strerror(errno));
  lane.waitsToSend = sending;
}

// False when this connection has nothing more to do.
bool Load::issue(Lane& lane, int64_t now) {
  if (phase_ != Phase::kReadBack && options_.count > 0 && issued_ == options_.count) return false;
  Slot& slot = lane.connection.take();
  const bool found = phase_ == Phase::kReadBack ? chooseForReadBack(slot) : choose(lane, slot);
  if (!found) {
    lane.connection.giveBack(slot);
    return false;
  }
  slot.queuedNs = now;
  if (slot.command != kFlush) {
    if (verifier_) verifier_->begin(slot);
    issued_++;
  }
  lane.connection.queue(slot, verifier_ ? slot.memory : payload_.data());
  return true;
}

bool Load::choose(Lane& lane, Slot& slot) {
  if (options_.flushEvery > 0 && lane.unflushed == options_.flushEvery) {
    lane.unflushed = 0;
    slot.command = kFlush;
    slot.offset = 0;
    slot.length = 0;
    return true;
  }
  uint64_t block;
  if (!chooseBlock(lane, block)) return false;
  const bool read = options_.readPercent == 100 || random_.below(100) < options_.readPercent;
  slot.command = read && (!verifier_ || verifier_->generationOf(block) > 0) ? kRead : kWrite;
  slot.offset = options_.offset + block * options_.strideBytes;
  slot.length = options_.blockBytes;
  if (slot.command == kWrite) lane.unflushed++;
  return true;
}

bool Load::chooseBlock(Lane& lane, uint64_t& block) {
  switch (options_.order) {
    case Order::kRandom: block = random_.below(blocks_); break;
    case Order::kShuffled:
      if (shuffled_ == blocks_) {
        if (options_.lap) return false;
        shuffled_ = 0;
      }
      block = shuffle_->at(shuffled_++);
      break;
    case Order::kSequential:
      if (lane.next == lane.blockEnd) {
        if (options_.lap) return false;
        lane.next = lane.blockFirst;
      }
      block = lane.next++;
      break;
  }
  // There are four blocks for each request under way.
  if (verifier_)
    while (verifier_->isBusy(block)) block = (block + 1) % blocks_;
  return true;
}

bool Load::chooseForReadBack(Slot& slot) {
  while (readBackNext_ < blocks_ && verifier_->generationOf(readBackNext_) == 0) readBackNext_++;
  if (readBackNext_ == blocks_) return false;
  slot.command = kRead;
  slot.offset = options_.offset + readBackNext_++ * options_.strideBytes;
  slot.length = options_.blockBytes;
  return true;
}

void Load::disconnect() {
  for (Lane& lane : lanes_) lane.connection.disconnect();
}

}  // namespace blockferry::load
