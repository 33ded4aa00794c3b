#include "batch.h"

#include <endian.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "system.h"

namespace blockferry {
namespace {

// Source: NetworkBlockDevice/nbd, doc/proto.md; those of extended headers: the same file on the branch extension-ext-header.
constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;
constexpr size_t kRequestBytes = 28;
constexpr size_t kExtendedRequestBytes = 32;
constexpr uint16_t kRead = 0;
constexpr uint16_t kWrite = 1;
constexpr uint16_t kFlagDontFragment = 1 << 2;
constexpr uint16_t kFlagPayloadLength = 1 << 5;
constexpr uint16_t kChunkDone = 1;
constexpr uint16_t kChunkNone = 0;
constexpr uint16_t kChunkData = 1;

// Header bytes before a READ's data, and of a WRITE's whole reply, by form.
constexpr size_t kDataHeadBytes[] = {16, 20 + 8, 32 + 8};
constexpr size_t kDoneBytes[] = {16, 16, 32};

constexpr uint64_t kBlockBits = 12;
// Many times what it takes to copy the longest WRITE of ours.
constexpr int64_t kHeldUpNs = 4 * 1000 * 1000;

struct Request {
  uint16_t flags;
  uint16_t command;
  uint64_t cookie;  // as it lies in memory
  uint64_t offset;
  uint64_t length;
};

template <typename Value>
Value raw(const uint8_t* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename Value>
uint8_t* put(uint8_t* to, Value value) {
  std::memcpy(to, &value, sizeof value);
  return to + sizeof value;
}

Request parse(const uint8_t* head, bool extended) {
  return {be16toh(raw<uint16_t>(head + 4)), be16toh(raw<uint16_t>(head + 6)), raw<uint64_t>(head + 8),
          be64toh(raw<uint64_t>(head + 16)),
          extended ? be64toh(raw<uint64_t>(head + 24)) : be32toh(raw<uint32_t>(head + 24))};
}

uint8_t* putChunkHead(uint8_t* to, Form form, uint16_t type, const Request& request, uint64_t payloadBytes) {
  const bool extended = form == Form::kExtended;
  to = put(to, htobe32(extended ? kExtendedReplyMagic : kStructuredReplyMagic));
  to = put(to, htobe16(kChunkDone));
  to = put(to, htobe16(type));
  to = put(to, request.cookie);
  if (!extended) return put(to, htobe32(static_cast<uint32_t>(payloadBytes)));
  to = put(to, htobe64(request.offset));
  return put(to, htobe64(payloadBytes));
}

void putSimple(uint8_t* to, const Request& request) {
  to = put(to, htobe32(kSimpleReplyMagic));
  to = put(to, uint32_t{0});
  put(to, request.cookie);
}

void putDataHead(uint8_t* to, Form form, const Request& request) {
  if (form == Form::kSimple) return putSimple(to, request);
  to = putChunkHead(to, form, kChunkData, request, 8 + request.length);
  put(to, htobe64(request.offset));
}

void putDone(uint8_t* to, Form form, const Request& request) {
  if (form == Form::kExtended) putChunkHead(to, form, kChunkNone, request, 0);
  else putSimple(to, request);
}

uint64_t endBlock(const Request& request) {
  return (request.offset + request.length + (1u << kBlockBits) - 1) >> kBlockBits;
}

bool isPresent(const Target& target, const Request& request) {
  if (target.present == nullptr) return true;
  const uint64_t end = endBlock(request);
  if ((end + 7) / 8 > target.presentBytes) return false;
  for (uint64_t block = request.offset >> kBlockBits; block < end; block++) {
    if ((target.present[block >> 3] & (1u << (block & 7))) == 0) return false;
  }
  return true;
}

// Whether the request is one that is always answered with success, if the image does its part.
bool isOurs(const Target& target, Form form, const Request& request) {
  const bool read = request.command == kRead;
  if (!read && request.command != kWrite) return false;
  if (read ? !target.reads : !target.writes) return false;
  const uint16_t readFlags = form == Form::kSimple ? 0 : kFlagDontFragment;
  const uint16_t writeFlags = form == Form::kExtended ? kFlagPayloadLength : 0;
  if ((request.flags & ~(read ? readFlags : writeFlags)) != 0) return false;
  if (request.length == 0 || request.length > (read ? target.readBytesMax : target.writeBytesMax)) return false;
  if (request.offset > target.bytes || request.length > target.bytes - request.offset) return false;
  if (!read && target.dirty != nullptr && (endBlock(request) + 7) / 8 > target.dirtyBytes) return false;
  return isPresent(target, request);
}

void markDirty(const Target& target, const Request& request) {
  if (target.dirty == nullptr) return;
  const uint64_t end = endBlock(request);
  for (uint64_t block = request.offset >> kBlockBits; block < end; block++)
    target.dirty[block >> 3] = static_cast<uint8_t>(target.dirty[block >> 3] | (1u << (block & 7)));
}

}  // namespace

Batch execute(const Target& target, Form form, const uint8_t* in, size_t inBytes, uint8_t* out, size_t outBytes,
              size_t repliesMax) {
  const bool extended = form == Form::kExtended;
  const size_t headBytes = extended ? kExtendedRequestBytes : kRequestBytes;
  const uint32_t magic = htobe32(extended ? kExtendedRequestMagic : kRequestMagic);
  const size_t dataHeadBytes = kDataHeadBytes[static_cast<size_t>(form)];
  const size_t doneBytes = kDoneBytes[static_cast<size_t>(form)];
  Batch batch = {0, 0, Stop::kEmpty, 0};
  const auto stopped = [&batch](Stop why) {
    batch.stop = why;
    return batch;
  };
  int64_t since = nowNs();  // what happens between two WRITEs of a batch takes no time beside kHeldUpNs
  for (size_t replies = 0; batch.consumed < inBytes; replies++) {
    const uint8_t* head = in + batch.consumed;
    const size_t left = inBytes - batch.consumed;
    if (left < headBytes) return stopped(Stop::kPartial);
    if (repliesMax > 0 && replies == repliesMax) return stopped(Stop::kFull);
    if (raw<uint32_t>(head) != magic) return stopped(Stop::kOther);
    const Request request = parse(head, extended);
    if (!isOurs(target, form, request)) return stopped(Stop::kOther);
    batch.writeBytes = request.command == kWrite ? headBytes + request.length : 0;
    uint8_t* reply = out + batch.produced;
    const size_t room = outBytes - batch.produced;
    if (request.command == kRead) {
      if (dataHeadBytes + request.length > room) return stopped(Stop::kFull);
      const int64_t got = readSome(target.fd, reply + dataHeadBytes, request.length, request.offset, target.nowait);
      if (got != static_cast<int64_t>(request.length))
        return stopped(target.nowait && (got >= 0 || got == -EAGAIN) ? Stop::kCold : Stop::kOther);
      countHeat(target.heat, request.offset, request.length, kHeatReadShift);
      putDataHead(reply, form, request);
      batch.consumed += headBytes;
      batch.produced += dataHeadBytes + request.length;
    } else {
      if (left - headBytes < request.length) return stopped(Stop::kPartial);
      if (doneBytes > room) return stopped(Stop::kFull);
      markDirty(target, request);
      if (writeAll(target.fd, head + headBytes, request.length, request.offset) < 0) return stopped(Stop::kOther);
      countHeat(target.heat, request.offset, request.length, kHeatWriteShift);
      putDone(reply, form, request);
      batch.consumed += headBytes + request.length;
      batch.produced += doneBytes;
      const int64_t now = nowNs();
      if (now - std::exchange(since, now) > kHeldUpNs) return stopped(Stop::kHeldUp);
    }
  }
  return batch;
}

}  // namespace blockferry
