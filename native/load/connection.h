// One connection in the transmission phase, and its requests under way.
//
// A request has a slot from `queue` to the end of its reply. Requests that are queued leave with the next `send`, all in
// one gathered write; headers that follow each other are one piece of it. Replies come in as much as fits a buffer of
// 256 KiB, which stays in the processor's cache; what was read is thrown away there, or copied to the slot's memory.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace blockferry::load {

struct Slot {
  uint64_t cookie = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
  uint32_t received = 0;
  int64_t queuedNs = 0;
  uint32_t generation = 0;  // of the data, when it is verified
  uint16_t command = 0;
  bool busy = false;
  uint8_t* memory = nullptr;  // blockBytes, or nullptr: what is read is thrown away
};

class Connection {
 public:
  // `memory` is depth * blockBytes, or nullptr.
  Connection(int fd, uint32_t depth, bool structured, uint8_t* memory, uint32_t blockBytes);

  int fd() const { return fd_; }
  bool hasRoom() const { return !free_.empty(); }
  bool isIdle() const { return free_.size() == slots_.size(); }
  bool isSent() const { return pieces_.empty(); }
  uint32_t underWay() const { return static_cast<uint32_t>(slots_.size() - free_.size()); }

  // A slot to fill in and `queue`; there must be room.
  Slot& take();
  // `payload`: the data of a WRITE, which stays as it is until the reply.
  void queue(Slot& slot, const uint8_t* payload);
  // Sends what the socket takes; true when nothing is left.
  bool send();
  // Receives once, waiting if that is wanted, and adds the slots whose replies are complete to `finished`. They are to
  // be given back. False if nothing was there.
  bool receive(bool wait, std::vector<Slot*>& finished);
  void giveBack(Slot& slot);
  // Says good-bye and closes.
  void disconnect();

 private:
  size_t parse(const uint8_t* bytes, size_t length, std::vector<Slot*>& finished);
  size_t parseSimple(const uint8_t* bytes, std::vector<Slot*>& finished);
  size_t parseChunk(const uint8_t* bytes, size_t length, std::vector<Slot*>& finished);
  void beginPayload(Slot& slot, uint64_t at, uint64_t length, bool last);
  Slot& slotOf(uint64_t cookie);
  void finish(Slot& slot, std::vector<Slot*>& finished);

  int fd_;
  bool structured_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  uint64_t sequence_ = 0;
  // Headers of what is queued, by sequence: at most `depth` are under way, so that none is overwritten before it is sent.
  std::vector<uint8_t> headers_;
  std::vector<iovec> pieces_;
  size_t pieceFirst_ = 0;
  std::vector<uint8_t> buffer_;
  size_t buffered_ = 0;  // bytes at the start of buffer_ that are not a whole header yet
  Slot* payloadOf_ = nullptr;
  uint64_t payloadLeft_ = 0;
  bool payloadLast_ = false;
};

}  // namespace blockferry::load
