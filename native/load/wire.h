// What is needed of the NBD protocol. Source: NetworkBlockDevice/nbd, doc/proto.md. Integers are big-endian.
#pragma once

#include <endian.h>

#include <cstdint>
#include <cstring>

namespace blockferry::load {

constexpr uint64_t kMagic = 0x4e42444d41474943;        // NBDMAGIC
constexpr uint64_t kOptionMagic = 0x49484156454f5054;  // IHAVEOPT
constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
constexpr uint16_t kFixedNewstyle = 1;
constexpr uint16_t kNoZeroes = 2;

constexpr uint32_t kOptionGo = 7;
constexpr uint32_t kOptionStructuredReply = 8;
constexpr uint32_t kReplyAck = 1;
constexpr uint32_t kReplyInfo = 3;
constexpr uint32_t kReplyErrorBit = 0x80000000;
constexpr uint32_t kReplyUnsupported = 0x80000001;
constexpr uint32_t kReplyTlsRequired = 0x80000005;
constexpr uint32_t kReplyUnknown = 0x80000006;
constexpr uint16_t kInfoExport = 0;
constexpr uint16_t kInfoBlockSize = 3;

constexpr uint16_t kFlagReadOnly = 1 << 1;
constexpr uint16_t kFlagSendFlush = 1 << 2;
constexpr uint16_t kFlagMultiConn = 1 << 8;

constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
constexpr uint32_t kRequestBytes = 28;
constexpr uint32_t kSimpleReplyBytes = 16;
constexpr uint32_t kStructuredReplyBytes = 20;

constexpr uint16_t kRead = 0;
constexpr uint16_t kWrite = 1;
constexpr uint16_t kDisconnect = 2;
constexpr uint16_t kFlush = 3;

constexpr uint16_t kChunkDone = 1;
constexpr uint16_t kChunkNone = 0;
constexpr uint16_t kChunkData = 1;
constexpr uint16_t kChunkHole = 2;
constexpr uint16_t kChunkErrorBit = 0x8000;

inline uint16_t get16(const uint8_t* from) {
  uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return be16toh(value);
}
inline uint32_t get32(const uint8_t* from) {
  uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return be32toh(value);
}
inline uint64_t get64(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return be64toh(value);
}
inline void put16(uint8_t* to, uint16_t value) {
  value = htobe16(value);
  std::memcpy(to, &value, sizeof value);
}
inline void put32(uint8_t* to, uint32_t value) {
  value = htobe32(value);
  std::memcpy(to, &value, sizeof value);
}
inline void put64(uint8_t* to, uint64_t value) {
  value = htobe64(value);
  std::memcpy(to, &value, sizeof value);
}

inline void putRequest(uint8_t* to, uint16_t command, uint64_t cookie, uint64_t offset, uint32_t length) {
  put32(to, kRequestMagic);
  put16(to + 4, 0);
  put16(to + 6, command);
  put64(to + 8, cookie);
  put64(to + 16, offset);
  put32(to + 24, length);
}

inline const char* commandName(uint16_t command) {
  return command == kRead ? "READ" : command == kWrite ? "WRITE" : "FLUSH";
}

}  // namespace blockferry::load
