#include "handshake.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "fail.h"
#include "wire.h"

namespace blockferry::load {
namespace {

constexpr uint32_t kOptionReplyBytesMax = 64 << 10;
constexpr size_t kMessageBytesMax = 200;

void setTimeouts(int fd, uint64_t timeoutMs) {
  const timeval time = {.tv_sec = static_cast<time_t>(timeoutMs / 1000),
                        .tv_usec = static_cast<suseconds_t>(timeoutMs % 1000 * 1000)};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
  ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

int connectUnix(const Options& options) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (options.unixPath.size() >= sizeof address.sun_path) wrongUsage("the path of the unix socket is too long");
  std::memcpy(address.sun_path, options.unixPath.data(), options.unixPath.size());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) fail("cannot make a socket: %s", std::strerror(errno));
  setTimeouts(fd, options.timeoutMs);
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    fail("cannot connect to %s: %s", options.unixPath.c_str(), std::strerror(errno));
  return fd;
}

int connectTcp(const Options& options) {
  addrinfo wanted = {};
  wanted.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int unknown = ::getaddrinfo(options.host.c_str(), options.port.c_str(), &wanted, &found);
  if (unknown != 0) fail("cannot find %s: %s", options.host.c_str(), ::gai_strerror(unknown));
  int error = 0;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const int fd = ::socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
    if (fd < 0) fail("cannot make a socket: %s", std::strerror(errno));
    setTimeouts(fd, options.timeoutMs);
    if (::connect(fd, at->ai_addr, at->ai_addrlen) == 0) {
      const int on = 1;
      ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      ::freeaddrinfo(found);
      return fd;
    }
    error = errno;
    ::close(fd);
  }
  fail("cannot connect to %s port %s: %s", options.host.c_str(), options.port.c_str(), std::strerror(error));
}

void sendAll(int fd, const std::vector<uint8_t>& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t sent = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) fail("the connection broke during the handshake: %s", std::strerror(errno));
    done += static_cast<size_t>(sent);
  }
}

std::vector<uint8_t> receiveAll(int fd, size_t length) {
  std::vector<uint8_t> bytes(length);
  for (size_t done = 0; done < length;) {
    const ssize_t got = ::recv(fd, bytes.data() + done, length - done, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) fail("the server does not answer the handshake");
    if (got < 0) fail("the connection broke during the handshake: %s", std::strerror(errno));
    if (got == 0) fail("the server closed the connection during the handshake");
    done += static_cast<size_t>(got);
  }
  return bytes;
}

struct OptionReply {
  uint32_t type;
  std::vector<uint8_t> data;
};

void sendOption(int fd, uint32_t option, const std::vector<uint8_t>& data) {
  std::vector<uint8_t> bytes(16);
  put64(&bytes[0], kOptionMagic);
  put32(&bytes[8], option);
  put32(&bytes[12], static_cast<uint32_t>(data.size()));
  bytes.insert(bytes.end(), data.begin(), data.end());
  sendAll(fd, bytes);
}

OptionReply receiveReply(int fd, uint32_t option) {
  const std::vector<uint8_t> head = receiveAll(fd, 20);
  const uint32_t length = get32(&head[16]);
  if (get64(&head[0]) != kOptionReplyMagic || get32(&head[8]) != option || length > kOptionReplyBytesMax)
    fail("the server broke the NBD protocol: its reply to option %u is none", option);
  return {get32(&head[12]), receiveAll(fd, length)};
}

[[noreturn]] void refused(const Options& options, const OptionReply& reply) {
  const char* name = options.exportName.c_str();
  if (reply.type == kReplyTlsRequired) fail("the server wants TLS, which the load does not speak");
  if (reply.type == kReplyUnknown) fail("the server has no export \"%s\"", name);
  if (reply.type == kReplyUnsupported) fail("the server is too old: it does not know NBD_OPT_GO");
  std::string message(reply.data.begin(), reply.data.begin() + std::min(reply.data.size(), kMessageBytesMax));
  std::replace_if(message.begin(), message.end(), [](char c) { return static_cast<unsigned char>(c) < ' '; }, ' ');
  fail("the server refuses the export \"%s\" with error %u%s%s", name, reply.type & ~kReplyErrorBit,
       message.empty() ? "" : ": ", message.c_str());
}

Export go(int fd, const Options& options) {
  const std::string& name = options.exportName;
  std::vector<uint8_t> data(4 + name.size() + 4);
  put32(&data[0], static_cast<uint32_t>(name.size()));
  std::memcpy(&data[4], name.data(), name.size());
  put16(&data[4 + name.size()], 1);
  put16(&data[6 + name.size()], kInfoBlockSize);
  sendOption(fd, kOptionGo, data);
  Export found;
  bool described = false;
  for (;;) {
    const OptionReply reply = receiveReply(fd, kOptionGo);
    if (reply.type == kReplyAck) break;
    if ((reply.type & kReplyErrorBit) != 0) refused(options, reply);
    if (reply.type != kReplyInfo || reply.data.size() < 2) continue;
    const uint16_t kind = get16(&reply.data[0]);
    if (kind == kInfoExport && reply.data.size() == 12) {
      found.sizeBytes = get64(&reply.data[2]);
      found.flags = get16(&reply.data[10]);
      described = true;
    } else if (kind == kInfoBlockSize && reply.data.size() == 14) {
      found.blockBytesMin = std::max<uint32_t>(1, get32(&reply.data[2]));
      found.blockBytesMax = get32(&reply.data[10]);
    }
  }
  if (!described) fail("the server broke the NBD protocol: it did not describe the export");
  return found;
}

}  // namespace

int connectTo(const Options& options) {
  return options.unixPath.empty() ? connectTcp(options) : connectUnix(options);
}

Export negotiate(int fd, const Options& options) {
  const std::vector<uint8_t> greeting = receiveAll(fd, 18);
  if (get64(&greeting[0]) != kMagic) fail("what listens there is no NBD server");
  const uint16_t flags = get16(&greeting[16]);
  if (get64(&greeting[8]) != kOptionMagic || (flags & kFixedNewstyle) == 0)
    fail("the server is too old: it does not speak the fixed newstyle handshake");
  std::vector<uint8_t> answer(4);
  put32(&answer[0], flags & (kFixedNewstyle | kNoZeroes));
  sendAll(fd, answer);
  bool structured = false;
  if (options.structured) {
    sendOption(fd, kOptionStructuredReply, {});
    structured = receiveReply(fd, kOptionStructuredReply).type == kReplyAck;
  }
  Export found = go(fd, options);
  found.structured = structured;
  return found;
}

}  // namespace blockferry::load
