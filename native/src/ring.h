// Reads that have to wait for the disk, many at a time, on the kernel's own queue (io_uring): begun with one system call for all
// of a turn, and awaited with none. No N-API here, no liburing.
//
// All calls come from the thread that opened the ring. The memory of a read, and its descriptor, belong to the ring until the read
// is reaped.
#pragma once

#include <cstddef>
#include <cstdint>

struct io_uring_sqe;
struct io_uring_cqe;

namespace blockferry {

struct Completion {
  uint32_t slot;
  // Bytes, or -errno.
  int32_t result;
};

class Ring {
 public:
  Ring() = default;
  Ring(const Ring&) = delete;
  ~Ring();

  // At most `entries` reads at a time. 0, or -errno where the system has no io_uring for us; then nothing else may be called.
  int64_t open(uint32_t entries);
  // Readable when there is something to reap.
  int eventFd() const { return eventFd_; }

  bool busy() const { return underWay_ > 0; }

  // `slot` names the read, and comes back with its end. `elsewhere`: a thread of the kernel's copies the data, not this one.
  // False: there are `entries` of them already.
  bool read(uint32_t slot, int fd, uint8_t* data, uint32_t length, uint64_t offset, bool elsewhere);
  // Begins all that was given to `read` -> how many of them did not begin (they will with the next call).
  uint32_t submit();
  // What has ended, `most` at most.
  size_t reap(Completion* completions, size_t most);
  // Waits until nothing is under way, and forgets it.
  void drain();

 private:
  size_t take(Completion* completions, size_t most);

  int fd_ = -1;
  int eventFd_ = -1;
  uint32_t entries_ = 0;
  uint32_t pending_ = 0;   // given to `read`, not begun
  uint32_t underWay_ = 0;  // not reaped, pending ones with them

  uint8_t* rings_ = nullptr;
  size_t ringsBytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  size_t sqesBytes_ = 0;
  uint32_t* sqTail_ = nullptr;
  uint32_t sqMask_ = 0;
  uint32_t* cqHead_ = nullptr;
  uint32_t* cqTail_ = nullptr;
  uint32_t cqMask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

}  // namespace blockferry
