// A session's turn without JavaScript: requests that have come are carried out (batch.h), their answers sent, and what comes next is
// received and carried out likewise, for as long as that goes on and the turn's time is not up. One synchronous call on the thread of
// the socket and the image; it keeps nothing.
//
// Before it gives up waiting it polls for a while, as KVM's halt polling does: to sleep and be woken costs more than a small request. What
// else the thread has to do ends that at once (the event loop's own descriptor tells), and so does another program that wants the processor.
#pragma once

#include <uv.h>

#include <cstddef>
#include <cstdint>

#include "batch.h"

namespace blockferry {

// Why an exchange ended. In each case [at, end) of the input is what was received and not carried out, and [outFrom, outTo) of the output
// what was answered and not sent.
enum class Ending : uint32_t {
  kIdle,    // nothing more has come; polling did not help. What is left is less than a request
  kTurn,    // the event loop has other work, or should look for it: to be called again behind that
  kOther,   // the session must see to the request at `at`
  kCold,    // likewise: a READ that waits for the disk
  kUnsent,  // the socket does not take more answers, or there is none, and no room
  kHeldUp,  // the kernel made a WRITE wait, which was answered: the next ones are better made elsewhere
  kClosed,  // the other end sends no more, or the connection is broken: the socket's stream will find out
};

// All fields are numbers of JavaScript, so that it writes and reads them in place; src/nbd/server/exchange.ts has the same order.
struct ExchangeJob {
  // What it is given.
  double socket;         // -1: the answers stay in the output, and nothing is received
  double image;
  double imageBytes;
  double access;         // bits: 1 reads, 2 writes, 4 nowait
  double form;
  double readBytesMax;
  double writeBytesMax;
  double repliesMax;     // answers are sent when there are so many, 1 at least; of the same input, then twice as many
  double receiveBytesMax; // received by the first receive, 1 at least
  double pollUs;         // polls for so long before it gives up; -1: nothing is received
  double sleeps;         // 1: sleeps for up to a millisecond instead of polling, as for a payload
  double turnUs;         // so often it asks whether the event loop has other work
  double splitBytesMin;  // so many bytes of answers, or more, are sent as a few and the rest (src/nbd/server/output.ts says why); 0: never
  // What it is given and gives back.
  double at, end;        // of the input
  double outFrom, outTo; // of the output
  // What it gives back.
  double receivedBytes;
  double others;          // kTurn: 1 if the loop's other work is not our own socket's
};

// Receives `length` bytes that are on their way -> how many came: fewer when nothing more came for a millisecond, when the loop has other
// work, after `turnUs`, or when the connection has ended, which its stream will find out. It sleeps for them: to be woken costs little beside
// them, and who sends them is at work.
size_t receivePayload(uv_loop_t* loop, int socket, uint8_t* data, size_t length, double turnUs);

Ending exchange(uv_loop_t* loop, ExchangeJob& job, uint8_t* in, size_t inBytes, uint8_t* out, size_t outBytes,
                const uint8_t* present, size_t presentBytes, Heat heat, uint8_t* dirty, size_t dirtyBytes);

}  // namespace blockferry
