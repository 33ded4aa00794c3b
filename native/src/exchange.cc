#include "exchange.h"

#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "system.h"

namespace blockferry {
namespace {

// Of WRITEs as long as this it is worth to receive no more than whole ones: what came of the next one would have to be moved.
constexpr size_t kMovedBytesMax = 32 << 10;

// What else the loop has to do ends the sleep, but for its timers.
constexpr int kSleepMs = 1;

// The loop's timers are not looked at during a call: it has its turn after this time even if nothing else is known to wait for it.
constexpr int64_t kAloneNs = 5 * 1000 * 1000;

// Of answers, in one call.
constexpr uint64_t kAnsweredBytesMax = 4 << 20;

// Longer between two looks while polling: another program had the processor, and wants it again.
constexpr int64_t kPreemptedNs = 100 * 1000;

int64_t nsOf(double us) { return static_cast<int64_t>(us * 1000); }

// Whether callbacks are due that nothing has to come for.
bool isDue(uv_loop_t* loop) { return uv_backend_timeout(loop) == 0; }

// Whether the loop would find something to do.
bool hasWork(uv_loop_t* loop) {
  pollfd state = {uv_backend_fd(loop), POLLIN, 0};
  return ::poll(&state, 1, 0) != 0;
}

enum class Work { kNone, kMaybeOurs, kOthers };

// Likewise, and whether it is known not to be what our own socket has received.
Work workOf(uv_loop_t* loop, int socket) {
  pollfd states[] = {{uv_backend_fd(loop), POLLIN, 0}, {socket, POLLIN, 0}};
  if (::poll(states, std::size(states), 0) < 0 || states[0].revents == 0) return Work::kNone;
  return states[1].revents == 0 ? Work::kOthers : Work::kMaybeOurs;
}

// How much to receive behind `end` bytes in a buffer of `capacity`: as much as fits, or WRITEs of `writeBytes` like the last one.
size_t receiveRoom(size_t end, size_t capacity, size_t writeBytes) {
  const size_t whole = writeBytes > kMovedBytesMax ? capacity / writeBytes * writeBytes : 0;
  return (whole > end ? whole : capacity) - end;
}

// Receives when there is something within the time -> bytes; 0: closed; -EAGAIN: nothing came; -EBUSY: something came for others;
// -EINPROGRESS: callbacks are due.
int64_t receivePolling(uv_loop_t* loop, int socket, uint8_t* data, size_t length, int64_t pollNs) {
  int64_t got = receiveSome(socket, data, length);
  if (got != -EAGAIN || pollNs <= 0) return got;
  if (isDue(loop)) return -EINPROGRESS;
  int64_t last = nowNs();
  const int64_t deadline = last + pollNs;
  for (;;) {
    if (hasWork(loop)) {
      got = receiveSome(socket, data, length);
      return got == -EAGAIN ? -EBUSY : got;
    }
    ::sched_yield();
    const int64_t now = nowNs();
    if (now >= deadline || now - last > kPreemptedNs) return -EAGAIN;
    last = now;
  }
}

// Likewise, but sleeps for it. Measured: to poll before that costs 5 to 20 % more processor time, and gains nothing.
int64_t receiveSleeping(uv_loop_t* loop, int socket, uint8_t* data, size_t length) {
  const int64_t got = receiveSome(socket, data, length);
  if (got != -EAGAIN) return got;
  if (isDue(loop)) return -EINPROGRESS;
  pollfd states[] = {{socket, POLLIN, 0}, {uv_backend_fd(loop), POLLIN, 0}};
  if (::poll(states, std::size(states), kSleepMs) <= 0) return got;
  return (states[0].revents & POLLIN) != 0 ? receiveSome(socket, data, length) : -EBUSY;
}

// What is sent before the rest of answers that are split.
constexpr size_t kSplitHeadBytes = 64;

// -> bytes, fewer if the socket does not take all; 0 also for what the stream will find out.
size_t sendAll(int socket, const uint8_t* data, size_t length, bool splits) {
  size_t sent = 0;
  if (splits) {
    sent = static_cast<size_t>(std::max<int64_t>(0, sendSome(socket, data, kSplitHeadBytes, true)));
    if (sent < kSplitHeadBytes) return sent;
  }
  return sent + static_cast<size_t>(std::max<int64_t>(0, sendSome(socket, data + sent, length - sent, false)));
}

// Sends the answers; false if the socket does not take all.
bool sendAnswers(ExchangeJob& job, const uint8_t* out) {
  const auto from = static_cast<size_t>(job.outFrom);
  const auto to = static_cast<size_t>(job.outTo);
  if (from == to) return true;
  const bool splits = job.splitBytesMin > 0 && static_cast<double>(to - from) >= job.splitBytesMin;
  const size_t sent = sendAll(static_cast<int>(job.socket), out + from, to - from, splits);
  if (sent != to - from) {
    job.outFrom += static_cast<double>(sent);
    return false;
  }
  job.outFrom = job.outTo = 0;
  return true;
}

}  // namespace

size_t receivePayload(uv_loop_t* loop, int socket, uint8_t* data, size_t length, double turnUs) {
  const int64_t deadline = nowNs() + nsOf(turnUs);
  size_t done = 0;
  while (done < length) {
    const int64_t got = receiveSleeping(loop, socket, data + done, length - done);
    if (got <= 0) break;
    done += static_cast<size_t>(got);
    if (done < length && nowNs() >= deadline) break;
  }
  return done;
}

Ending exchange(uv_loop_t* loop, ExchangeJob& job, uint8_t* in, size_t inBytes, uint8_t* out, size_t outBytes,
                const uint8_t* present, size_t presentBytes, Heat heat, uint8_t* dirty, size_t dirtyBytes) {
  const int socket = static_cast<int>(job.socket);
  const auto access = static_cast<uint32_t>(job.access);
  const Target target = {static_cast<int>(job.image),
                         static_cast<uint64_t>(job.imageBytes),
                         (access & 1) != 0,
                         (access & 2) != 0,
                         (access & 4) != 0,
                         static_cast<uint32_t>(job.readBytesMax),
                         static_cast<uint32_t>(job.writeBytesMax),
                         present,
                         presentBytes,
                         heat,
                         dirty,
                         dirtyBytes};
  const Form form = static_cast<Form>(static_cast<uint32_t>(job.form));
  auto at = static_cast<size_t>(job.at);
  auto end = static_cast<size_t>(job.end);
  const auto ended = [&](Ending ending) {
    job.at = static_cast<double>(at);
    job.end = static_cast<double>(end);
    return ending;
  };
  size_t writeBytes = 0;
  auto receiveBytesMax = static_cast<size_t>(job.receiveBytesMax);
  uint64_t answeredBytes = 0;
  int64_t deadline = nowNs() + nsOf(job.turnUs);
  const int64_t last = deadline + kAloneNs;
  for (;;) {
    Stop stop = Stop::kEmpty;
    auto repliesMax = socket < 0 ? 0 : static_cast<size_t>(job.repliesMax);
    while (at < end) {
      const auto outTo = static_cast<size_t>(job.outTo);
      const Batch batch = execute(target, form, in + at, end - at, out + outTo, outBytes - outTo, repliesMax);
      if (repliesMax > 0) repliesMax = 2 * static_cast<size_t>(job.repliesMax);
      at += batch.consumed;
      job.outTo += static_cast<double>(batch.produced);
      answeredBytes += batch.produced;
      stop = batch.stop;
      writeBytes = batch.writeBytes;
      if (socket >= 0 ? !sendAnswers(job, out) : stop == Stop::kFull) return ended(Ending::kUnsent);
      if (stop != Stop::kFull) break;
      if (batch.consumed == 0 && outTo == 0) return ended(Ending::kOther);  // a reply that no output holds
      if (answeredBytes > kAnsweredBytesMax) return ended(Ending::kTurn);
    }
    if (stop == Stop::kOther) return ended(Ending::kOther);
    if (stop == Stop::kCold) return ended(Ending::kCold);
    if (stop == Stop::kHeldUp) return ended(Ending::kHeldUp);
    if (socket < 0 || job.pollUs < 0) return ended(Ending::kIdle);
    // What is left begins a request, whose rest belongs behind it.
    if (at > 0) {
      if (at < end) std::memmove(in, in + at, end - at);
      end -= at;
      at = 0;
    }
    if (end == inBytes) return ended(Ending::kOther);  // a request that no input holds
    if (const int64_t now = nowNs(); now >= deadline) {
      const Work work = workOf(loop, socket);
      job.others = work == Work::kOthers ? 1 : 0;
      if (now >= last || work != Work::kNone) return ended(Ending::kTurn);
      deadline = now + nsOf(job.turnUs);
    }
    const size_t room = std::min(receiveRoom(end, inBytes, writeBytes), receiveBytesMax);
    receiveBytesMax = inBytes;
    const int64_t got = job.sleeps != 0 ? receiveSleeping(loop, socket, in + end, room)
                                        : receivePolling(loop, socket, in + end, room, nsOf(job.pollUs));
    if (got == -EAGAIN) return ended(Ending::kIdle);
    if (got == -EBUSY || got == -EINPROGRESS) {
      job.others = got == -EBUSY ? 1 : 0;
      return ended(Ending::kTurn);
    }
    if (got <= 0) return ended(Ending::kClosed);
    end += static_cast<size_t>(got);
    job.receivedBytes += static_cast<double>(got);
  }
}

}  // namespace blockferry
