#include "system.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <ctime>

namespace blockferry {
namespace {

// One write of zeros when the kernel cannot zero a range itself.
constexpr size_t kZeroPieceBytes = 1 << 20;
// Linux block devices have logical blocks of a page at most: every one takes ranges aligned to this or the
// page size.
constexpr uint64_t kDeviceBlockBytes = 4096;
// Most bytes one read or write moves on Linux (MAX_RW_COUNT); asking for more only invites EINVAL from odd
// file systems.
constexpr size_t kTransferBytesMax = 0x7ffff000;

// Never written to. Not const, so that it costs no space in the file.
alignas(4096) uint8_t zeros[kZeroPieceBytes];

template <typename Call>
int64_t retried(Call call) {
  for (;;) {
    const int64_t result = call();
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

// One read of data. Not by libc's functions: those of a process with threads prepare for being cancelled, at 3 % of the cost of a block from
// the page cache. Positions are whole in one argument: 64-bit systems only, as Node's are. Writes do go by libc, where tests
// that lose power listen.
static_assert(sizeof(long) == 8);

int64_t preadOnce(int fd, uint8_t* data, size_t length, uint64_t offset) {
  return retried([=] { return ::syscall(SYS_pread64, fd, data, length, offset); });
}

int64_t preadOnceNowait(int fd, uint8_t* data, size_t length, uint64_t offset) {
  iovec piece = {data, length};
  return retried([&] { return ::syscall(SYS_preadv2, fd, &piece, 1L, offset, 0L, RWF_NOWAIT); });
}

int64_t writeZeros(int fd, uint64_t offset, uint64_t length) {
  while (length > 0) {
    const size_t piece = std::min<uint64_t>(length, kZeroPieceBytes);
    const int64_t result = writeAll(fd, zeros, piece, offset);
    if (result < 0) return result;
    offset += piece;
    length -= piece;
  }
  return 0;
}

int64_t fallocateOnce(int fd, int mode, uint64_t offset, uint64_t length) {
  return retried([=] { return ::fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(length)); });
}

bool isBlockDevice(int fd) {
  struct stat status;
  return ::fstat(fd, &status) == 0 && S_ISBLK(status.st_mode);
}

// fallocate in a mode that leaves zeros. Block devices refuse ranges that are not whole logical blocks: of
// them, the whole blocks are done this way and the edges are written.
int64_t fallocateZeros(int fd, int mode, uint64_t offset, uint64_t length) {
  if (!isBlockDevice(fd)) return fallocateOnce(fd, mode, offset, length);
  const uint64_t unit = std::max(kDeviceBlockBytes, static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)));
  const uint64_t end = offset + length;
  const uint64_t inner = (offset + unit - 1) / unit * unit;
  const uint64_t innerEnd = end / unit * unit;
  if (inner >= innerEnd) return writeZeros(fd, offset, length);
  // The middle first: if the device cannot do it, nothing has been written.
  if (const int64_t middle = fallocateOnce(fd, mode, inner, innerEnd - inner); middle < 0) return middle;
  if (const int64_t head = writeZeros(fd, offset, inner - offset); head < 0) return head;
  return writeZeros(fd, innerEnd, end - innerEnd);
}

int64_t punch(int fd, uint64_t offset, uint64_t length) {
  return fallocateZeros(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

// Linux drops a device's cached pages, dirty ones too, before it learns that the device cannot punch or zero
// (blkdev_fallocate): what was written and not yet synced would be lost although nothing was done.
int64_t writeOut(int fd, uint64_t offset, uint64_t length) {
  if (!isBlockDevice(fd)) return 0;
  constexpr unsigned kWriteOut = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  return retried(
      [=] { return ::sync_file_range(fd, static_cast<off_t>(offset), static_cast<off_t>(length), kWriteOut); });
}

// The kernel could not do it this way, which says nothing about other ways. EBUSY: a block device's cached
// pages were in use.
bool otherWayMayWork(int64_t result) {
  return result == -EOPNOTSUPP || result == -EINVAL || result == -EBUSY || result == -ENOSYS || result == -ENODEV;
}

int64_t seekKind(int fd, uint64_t offset, int whence) {
  const int64_t result = retried([=] { return ::lseek(fd, static_cast<off_t>(offset), whence); });
  if (result != -EINVAL) return result;
  // Block devices know no holes: all of it is data.
  const int64_t size = seekEnd(fd);
  if (size < 0) return size;
  if (offset >= static_cast<uint64_t>(size)) return -ENXIO;
  return whence == SEEK_DATA ? static_cast<int64_t>(offset) : size;
}

}  // namespace

int64_t nowNs() {
  timespec time;
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

int64_t readSome(int fd, uint8_t* data, size_t length, uint64_t offset, bool nowait) {
  length = std::min(length, kTransferBytesMax);
  return nowait ? preadOnceNowait(fd, data, length, offset) : preadOnce(fd, data, length, offset);
}

int64_t readAll(int fd, uint8_t* data, size_t length, uint64_t offset) {
  size_t done = 0;
  while (done < length) {
    const int64_t result = readSome(fd, data + done, length - done, offset + done, false);
    if (result < 0) return result;
    if (result == 0) break;
    done += static_cast<size_t>(result);
  }
  return static_cast<int64_t>(done);
}

int64_t writeAll(int fd, const uint8_t* data, size_t length, uint64_t offset) {
  size_t done = 0;
  while (done < length) {
    const size_t piece = std::min(length - done, kTransferBytesMax);
    const int64_t result =
        retried([=] { return ::pwrite(fd, data + done, piece, static_cast<off_t>(offset + done)); });
    if (result < 0) return result;
    if (result == 0) return -EIO;
    done += static_cast<size_t>(result);
  }
  return static_cast<int64_t>(length);
}

int64_t punchHole(int fd, uint64_t offset, uint64_t length) {
  if (length == 0) return 0;
  const int64_t kept = writeOut(fd, offset, length);
  return kept < 0 ? kept : punch(fd, offset, length);
}

int64_t zeroRange(int fd, uint64_t offset, uint64_t length, bool keepHole) {
  if (length == 0) return 0;
  if (keepHole) {
    const int64_t result = punch(fd, offset, length);
    // Splitting an extent to punch a hole can need a block of metadata; keeping the space can not.
    if (result >= 0 || !(otherWayMayWork(result) || result == -ENOSPC)) return result;
  }
  const int64_t result = fallocateZeros(fd, FALLOC_FL_ZERO_RANGE, offset, length);
  if (result >= 0 || !otherWayMayWork(result)) return result;
  return writeZeros(fd, offset, length);
}

int64_t zeroFast(int fd, uint64_t offset, uint64_t length, bool keepHole) {
  if (length == 0) return 0;
  if (const int64_t kept = writeOut(fd, offset, length); kept < 0) return kept;
  int64_t result = keepHole ? punch(fd, offset, length) : -EOPNOTSUPP;
  if (result < 0 && (otherWayMayWork(result) || result == -ENOSPC)) {
    result = fallocateZeros(fd, FALLOC_FL_ZERO_RANGE, offset, length);
  }
  return result < 0 && otherWayMayWork(result) ? -EOPNOTSUPP : result;
}

int64_t allocate(int fd, uint64_t offset, uint64_t length) {
  if (length == 0) return 0;
  // Not posix_fallocate: its fallback reads and rewrites a byte per block, and would lose what others write
  // meanwhile.
  const int64_t result = fallocateOnce(fd, 0, offset, length);
  if (result >= 0) return result;
  if (!isBlockDevice(fd)) return result;
  const int64_t size = seekEnd(fd);
  if (size < 0) return size;
  return offset + length <= static_cast<uint64_t>(size) ? 0 : -ENOSPC;
}

int64_t syncData(int fd) {
  return retried([=] { return ::fdatasync(fd); });
}

int64_t seekData(int fd, uint64_t offset) { return seekKind(fd, offset, SEEK_DATA); }

int64_t seekHole(int fd, uint64_t offset) { return seekKind(fd, offset, SEEK_HOLE); }

int64_t seekEnd(int fd) {
  return retried([=] { return ::lseek(fd, 0, SEEK_END); });
}

int64_t peerGone(int fd) {
  struct pollfd state = {};
  state.fd = fd;
  state.events = POLLRDHUP;
  const int64_t result = retried([&] { return ::poll(&state, 1, 0); });
  if (result < 0) return result;
  return (state.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0 ? 1 : 0;
}

int64_t receiveSome(int fd, uint8_t* data, size_t length) {
  return retried([=] { return ::recv(fd, data, length, MSG_DONTWAIT); });
}

int64_t sendSome(int fd, const uint8_t* data, size_t length, bool more) {
  const int flags = MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0);
  return retried([=] { return ::send(fd, data, length, flags); });
}

int64_t sendBuffer(int fd, uint64_t bytes) {
  // The kernel doubles it, for what it needs besides the bytes (socket(7)).
  const int value = static_cast<int>(std::min<uint64_t>(bytes, INT_MAX / 2));
  if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &value, sizeof value) == 0) return 0;
  return ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, sizeof value) == 0 ? 0 : -errno;
}

int64_t lockFile(int fd, bool exclusive) {
  struct flock lock = {};
  lock.l_type = exclusive ? F_WRLCK : F_RDLCK;
  lock.l_whence = SEEK_SET;
  const int64_t result = retried([&] { return ::fcntl(fd, F_OFD_SETLK, &lock); });
  if (result >= 0) return 1;
  return result == -EAGAIN || result == -EACCES ? 0 : result;
}

int64_t duplicate(int fd) {
  return retried([=] { return ::fcntl(fd, F_DUPFD_CLOEXEC, 0); });
}

int64_t socketPair(int pair[2]) {
  return ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0 ? -errno : 0;
}

int64_t closeFd(int fd) {
  // On Linux the descriptor is gone after EINTR too; closing again could hit somebody else's.
  return ::close(fd) < 0 && errno != EINTR ? -errno : 0;
}

int64_t mapShared(int fd, size_t length, void** address) {
  const int64_t size = seekEnd(fd);
  if (size < 0) return size;
  if (static_cast<uint64_t>(size) < length) return -EOVERFLOW;
  void* mapped = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return -errno;
  *address = mapped;
  return 0;
}

void unmap(void* address, size_t length) { ::munmap(address, length); }

}  // namespace blockferry
