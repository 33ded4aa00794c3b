#include "ring.h"

#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace blockferry {
namespace {

// Of newer kernels than the headers may be (6.0, 6.1); an older kernel says EINVAL, and does without.
constexpr uint32_t kSingleIssuer = 1u << 12;
constexpr uint32_t kDeferTaskrun = 1u << 13;
// What came with IORING_OP_READ (5.6), and one mapping for both rings (5.4).
constexpr uint32_t kFeatures = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS | IORING_FEAT_NODROP;

int setUp(uint32_t entries, io_uring_params& params) {
  for (const uint32_t flags : {kSingleIssuer | kDeferTaskrun, 0u}) {
    params = {};
    params.flags = flags;
    const long fd = ::syscall(__NR_io_uring_setup, entries, &params);
    if (fd >= 0) return static_cast<int>(fd);
    if (errno != EINVAL) break;
  }
  return -errno;
}

// Answers how many were begun, or -errno.
int64_t enter(int fd, uint32_t toSubmit, uint32_t least, uint32_t flags) {
  for (;;) {
    const long result = ::syscall(__NR_io_uring_enter, fd, toSubmit, least, flags, nullptr, 0);
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

uint32_t acquire(uint32_t* from) { return std::atomic_ref<uint32_t>(*from).load(std::memory_order_acquire); }

void release(uint32_t* to, uint32_t value) {
  std::atomic_ref<uint32_t>(*to).store(value, std::memory_order_release);
}

}  // namespace

Ring::~Ring() {
  if (fd_ >= 0) drain();
  if (sqes_ != nullptr) ::munmap(sqes_, sqesBytes_);
  if (rings_ != nullptr) ::munmap(rings_, ringsBytes_);
  if (fd_ >= 0) ::close(fd_);
  if (eventFd_ >= 0) ::close(eventFd_);
}

int64_t Ring::open(uint32_t entries) {
  io_uring_params params;
  fd_ = setUp(entries, params);
  if (fd_ < 0) return fd_;
  if ((params.features & kFeatures) != kFeatures) return -ENOSYS;
  entries_ = params.sq_entries;
  const size_t sqBytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
  const size_t cqBytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  ringsBytes_ = std::max(sqBytes, cqBytes);
  sqesBytes_ = params.sq_entries * sizeof(io_uring_sqe);
  constexpr int kProtection = PROT_READ | PROT_WRITE;
  constexpr int kFlags = MAP_SHARED | MAP_POPULATE;
  void* rings = ::mmap(nullptr, ringsBytes_, kProtection, kFlags, fd_, IORING_OFF_SQ_RING);
  if (rings == MAP_FAILED) return -errno;
  rings_ = static_cast<uint8_t*>(rings);
  void* sqes = ::mmap(nullptr, sqesBytes_, kProtection, kFlags, fd_, IORING_OFF_SQES);
  if (sqes == MAP_FAILED) return -errno;
  sqes_ = static_cast<io_uring_sqe*>(sqes);
  const auto at = [this](uint32_t offset) { return reinterpret_cast<uint32_t*>(rings_ + offset); };
  sqTail_ = at(params.sq_off.tail);
  sqMask_ = *at(params.sq_off.ring_mask);
  cqHead_ = at(params.cq_off.head);
  cqTail_ = at(params.cq_off.tail);
  cqMask_ = *at(params.cq_off.ring_mask);
  cqes_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
  for (uint32_t index = 0; index < entries_; index++) at(params.sq_off.array)[index] = index;
  eventFd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (eventFd_ < 0) return -errno;
  if (::syscall(__NR_io_uring_register, fd_, IORING_REGISTER_EVENTFD, &eventFd_, 1) < 0) return -errno;
  return 0;
}

// The completion ring has twice as many places, so it never overflows.
bool Ring::read(uint32_t slot, int fd, uint8_t* data, uint32_t length, uint64_t offset, bool elsewhere) {
  if (underWay_ == entries_) return false;
  const uint32_t tail = *sqTail_;
  io_uring_sqe& sqe = sqes_[tail & sqMask_];
  std::memset(&sqe, 0, sizeof sqe);
  sqe.opcode = IORING_OP_READ;
  if (elsewhere) sqe.flags = IOSQE_ASYNC;
  sqe.fd = fd;
  sqe.addr = reinterpret_cast<uintptr_t>(data);
  sqe.len = length;
  sqe.off = offset;
  sqe.user_data = slot;
  release(sqTail_, tail + 1);
  pending_++;
  underWay_++;
  return true;
}

uint32_t Ring::submit() {
  while (pending_ > 0) {
    const int64_t begun = enter(fd_, pending_, 0, 0);
    if (begun <= 0) break;  // short of memory
    pending_ -= static_cast<uint32_t>(begun);
  }
  return pending_;
}

size_t Ring::reap(Completion* completions, size_t most) {
  uint64_t count;
  [[maybe_unused]] const ssize_t got = ::read(eventFd_, &count, sizeof count);
  // Work that the kernel has put off for this thread.
  enter(fd_, 0, 0, IORING_ENTER_GETEVENTS);
  return take(completions, most);
}

size_t Ring::take(Completion* completions, size_t most) {
  uint32_t head = *cqHead_;
  const uint32_t tail = acquire(cqTail_);
  size_t taken = 0;
  for (; head != tail && taken < most; head++) {
    const io_uring_cqe& cqe = cqes_[head & cqMask_];
    completions[taken++] = {static_cast<uint32_t>(cqe.user_data), cqe.res};
  }
  release(cqHead_, head);
  underWay_ -= static_cast<uint32_t>(taken);
  return taken;
}

void Ring::drain() {
  Completion completions[64];
  while (underWay_ > 0) {
    submit();
    enter(fd_, 0, underWay_ > pending_ ? 1 : 0, IORING_ENTER_GETEVENTS);
    take(completions, std::size(completions));
  }
}

}  // namespace blockferry
