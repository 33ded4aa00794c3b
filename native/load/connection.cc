#include "connection.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "fail.h"
#include "wire.h"

namespace blockferry::load {
namespace {

constexpr size_t kBufferBytes = 256 << 10;
constexpr uint32_t kChunkBytesMax = (32 << 20) + 8;

[[noreturn]] void lost(int error, uint32_t underWay) {
  fail("the connection broke with %u requests under way: %s", underWay, std::strerror(error));
}

[[noreturn]] void failed(const Slot& slot, uint32_t error) {
  fail("%s of %u bytes at offset %llu failed: %s (NBD error %u)", commandName(slot.command), slot.length,
       static_cast<unsigned long long>(slot.offset), std::strerror(static_cast<int>(error)), error);
}

[[noreturn]] void broken(const char* how) { fail("the server broke the NBD protocol: %s", how); }

}  // namespace

Connection::Connection(int fd, uint32_t depth, bool structured, uint8_t* memory, uint32_t blockBytes)
    : fd_(fd), structured_(structured), slots_(depth), headers_(size_t{depth} * kRequestBytes), buffer_(kBufferBytes) {
  for (uint32_t index = 0; index < depth; index++) {
    if (memory != nullptr) slots_[index].memory = memory + size_t{index} * blockBytes;
    free_.push_back(depth - 1 - index);
  }
}

Slot& Connection::take() {
  Slot& slot = slots_[free_.back()];
  free_.pop_back();
  return slot;
}

void Connection::giveBack(Slot& slot) {
  slot.busy = false;
  free_.push_back(static_cast<uint32_t>(&slot - slots_.data()));
}

void Connection::queue(Slot& slot, const uint8_t* payload) {
  const size_t index = static_cast<size_t>(&slot - slots_.data());
  slot.cookie = (sequence_ << 16) | index;
  slot.received = 0;
  slot.busy = true;
  uint8_t* header = &headers_[sequence_ % slots_.size() * kRequestBytes];
  sequence_++;
  putRequest(header, slot.command, slot.cookie, slot.offset, slot.length);
  if (!pieces_.empty() && static_cast<uint8_t*>(pieces_.back().iov_base) + pieces_.back().iov_len == header)
    pieces_.back().iov_len += kRequestBytes;
  else pieces_.push_back({header, kRequestBytes});
  if (slot.command == kWrite) pieces_.push_back({const_cast<uint8_t*>(payload), slot.length});
}

bool Connection::send() {
  while (pieceFirst_ < pieces_.size()) {
    msghdr message = {};
    message.msg_iov = &pieces_[pieceFirst_];
    message.msg_iovlen = std::min<size_t>(pieces_.size() - pieceFirst_, IOV_MAX);
    const ssize_t sent = ::sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
      lost(errno, underWay());
    }
    size_t left = static_cast<size_t>(sent);
    while (left > 0) {
      iovec& piece = pieces_[pieceFirst_];
      const size_t part = std::min(left, piece.iov_len);
      piece.iov_base = static_cast<uint8_t*>(piece.iov_base) + part;
      piece.iov_len -= part;
      left -= part;
      if (piece.iov_len == 0) pieceFirst_++;
    }
  }
  pieces_.clear();
  pieceFirst_ = 0;
  return true;
}

bool Connection::receive(bool wait, std::vector<Slot*>& finished) {
  const ssize_t got = ::recv(fd_, &buffer_[buffered_], buffer_.size() - buffered_, wait ? 0 : MSG_DONTWAIT);
  if (got < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return false;
    lost(errno, underWay());
  }
  if (got == 0) fail("the server closed the connection with %u requests under way", underWay());
  const size_t have = buffered_ + static_cast<size_t>(got);
  const size_t used = parse(buffer_.data(), have, finished);
  buffered_ = have - used;
  if (buffered_ > 0 && used > 0) std::memmove(buffer_.data(), &buffer_[used], buffered_);
  return true;
}

size_t Connection::parse(const uint8_t* bytes, size_t length, std::vector<Slot*>& finished) {
  size_t used = 0;
  for (;;) {
    if (payloadOf_ != nullptr) {
      Slot& slot = *payloadOf_;
      const auto part = static_cast<size_t>(std::min<uint64_t>(payloadLeft_, length - used));
      if (slot.memory != nullptr) std::memcpy(slot.memory + slot.received, bytes + used, part);
      slot.received += static_cast<uint32_t>(part);
      payloadLeft_ -= part;
      used += part;
      if (payloadLeft_ > 0) return used;
      payloadOf_ = nullptr;
      if (payloadLast_) finish(slot, finished);
    }
    if (length - used < kSimpleReplyBytes) return used;
    const uint32_t magic = get32(bytes + used);
    size_t head = 0;
    if (magic == kSimpleReplyMagic) head = parseSimple(bytes + used, finished);
    else if (magic == kStructuredReplyMagic && structured_) head = parseChunk(bytes + used, length - used, finished);
    else broken("what it sent is no reply");
    if (head == 0) return used;
    used += head;
  }
}

Slot& Connection::slotOf(uint64_t cookie) {
  const uint64_t index = cookie & 0xffff;
  if (index >= slots_.size() || !slots_[index].busy || slots_[index].cookie != cookie)
    broken("a reply to a request that is not under way");
  return slots_[index];
}

size_t Connection::parseSimple(const uint8_t* bytes, std::vector<Slot*>& finished) {
  Slot& slot = slotOf(get64(bytes + 8));
  const uint32_t error = get32(bytes + 4);
  if (error != 0) failed(slot, error);
  if (slot.command != kRead) finish(slot, finished);
  else if (structured_) broken("a simple reply to READ where structured ones were agreed on");
  else beginPayload(slot, slot.offset, slot.length, true);
  return kSimpleReplyBytes;
}

// The chunks of a reply are taken in the order of their offsets only, as every known server sends them.
size_t Connection::parseChunk(const uint8_t* bytes, size_t length, std::vector<Slot*>& finished) {
  if (length < kStructuredReplyBytes) return 0;
  Slot& slot = slotOf(get64(bytes + 8));
  const bool last = (get16(bytes + 4) & kChunkDone) != 0;
  const uint16_t type = get16(bytes + 6);
  const uint32_t payload = get32(bytes + 16);
  if (payload > kChunkBytesMax) broken("a chunk of more than 32 MiB");
  const uint8_t* body = bytes + kStructuredReplyBytes;
  const size_t there = length - kStructuredReplyBytes;
  if ((type & kChunkErrorBit) != 0) {
    if (payload < 6) broken("an error chunk that is too short");
    if (there < 6) return 0;
    failed(slot, get32(body));
  }
  if (type == kChunkNone && payload == 0) {
    if (last) finish(slot, finished);
    return kStructuredReplyBytes;
  }
  if (type == kChunkData && payload > 8) {
    if (there < 8) return 0;
    beginPayload(slot, get64(body), payload - 8, last);
    return kStructuredReplyBytes + 8;
  }
  if (type == kChunkHole && payload == 12) {
    if (there < 12) return 0;
    const uint32_t hole = get32(body + 8);
    beginPayload(slot, get64(body), hole, false);
    if (slot.memory != nullptr) std::memset(slot.memory + slot.received, 0, hole);
    slot.received += hole;
    payloadOf_ = nullptr;
    if (last) finish(slot, finished);
    return kStructuredReplyBytes + 12;
  }
  broken("a chunk of an unknown type");
}

void Connection::beginPayload(Slot& slot, uint64_t at, uint64_t length, bool last) {
  if (slot.command != kRead || at != slot.offset + slot.received || length > slot.length - slot.received)
    broken("data that was not asked for");
  payloadOf_ = &slot;
  payloadLeft_ = length;
  payloadLast_ = last;
}

void Connection::finish(Slot& slot, std::vector<Slot*>& finished) {
  if (slot.command == kRead && slot.received != slot.length) broken("a reply to READ with too little data");
  slot.busy = false;
  finished.push_back(&slot);
}

void Connection::disconnect() {
  uint8_t request[kRequestBytes];
  putRequest(request, kDisconnect, 0, 0, 0);
  // Whether it arrives does not matter any more.
  [[maybe_unused]] const ssize_t sent = ::send(fd_, request, sizeof request, MSG_DONTWAIT | MSG_NOSIGNAL);
  ::close(fd_);
}

}  // namespace blockferry::load
