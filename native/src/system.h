// The system calls Node lacks. No N-API here: every function answers a count or offset >= 0, or -errno.
// Ranges are bytes; callers have checked that offset and length are not above 2^53, so that their sum fits
// off_t.
#pragma once

#include <cstddef>
#include <cstdint>

namespace blockferry {

// Of a clock that only goes on.
int64_t nowNs();

// One pread; may be short, 0 at the end of the file. With nowait only what needs no waiting (RWF_NOWAIT),
// else -EAGAIN; -EOPNOTSUPP where the file system does not know how.
int64_t readSome(int fd, uint8_t* data, size_t length, uint64_t offset, bool nowait);
// Reads until length or the end of the file.
int64_t readAll(int fd, uint8_t* data, size_t length, uint64_t offset);
// Writes all of it; answers length.
int64_t writeAll(int fd, const uint8_t* data, size_t length, uint64_t offset);

int64_t punchHole(int fd, uint64_t offset, uint64_t length);
int64_t zeroRange(int fd, uint64_t offset, uint64_t length, bool keepHole);
int64_t zeroFast(int fd, uint64_t offset, uint64_t length, bool keepHole);
int64_t allocate(int fd, uint64_t offset, uint64_t length);
int64_t syncData(int fd);

int64_t seekData(int fd, uint64_t offset);
int64_t seekHole(int fd, uint64_t offset);
int64_t seekEnd(int fd);

// 1 if the other end of a socket sends no more, though what it sent before may not have been read; 0 if it may.
int64_t peerGone(int fd);

// Receives what is there -> bytes, 0 at the end, -EAGAIN for nothing yet.
int64_t receiveSome(int fd, uint8_t* data, size_t length);
// Sends what the socket takes at once, without a signal if its other end is gone -> bytes, -EAGAIN for none. `more` follows.
int64_t sendSome(int fd, const uint8_t* data, size_t length, bool more);

// Lets a socket take `bytes` before its other end has read them, or as many as the system allows (net.core.wmem_max; root
// is not bound by it). Answers 0.
int64_t sendBuffer(int fd, uint64_t bytes);

// 1 if the lock is ours now, 0 if somebody else's is in the way.
int64_t lockFile(int fd, bool exclusive);
int64_t duplicate(int fd);
int64_t socketPair(int pair[2]);
int64_t closeFd(int fd);

// Maps the file's first bytes, read-write and shared. -EOVERFLOW if the file is shorter: touching what is
// behind its end would be a SIGBUS.
int64_t mapShared(int fd, size_t length, void** address);
void unmap(void* address, size_t length);

}  // namespace blockferry
