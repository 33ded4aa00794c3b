#include "options.h"

#include <cerrno>
#include <cstring>

#include "fail.h"

namespace blockferry::load {
namespace {

constexpr uint64_t kTimeMsMax = 86400 * 1000;
constexpr uint64_t kWholeMax = uint64_t{1} << 53;

uint64_t whole(const char* name, const char* text, uint64_t min, uint64_t max) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text, &end, 10);
  if (errno != 0 || *text < '0' || *text > '9' || *end != '\0' || value < min || value > max)
    wrongUsage("%s takes a whole number in %llu..%llu, not \"%s\"", name, static_cast<unsigned long long>(min),
               static_cast<unsigned long long>(max), text);
  return value;
}

Order parseOrder(const char* text) {
  if (std::strcmp(text, "random") == 0) return Order::kRandom;
  if (std::strcmp(text, "shuffled") == 0) return Order::kShuffled;
  if (std::strcmp(text, "sequential") == 0) return Order::kSequential;
  wrongUsage("--order is random, shuffled or sequential, not \"%s\"", text);
}

void parseOption(Options& options, const char* name, const char* value) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const auto number = [name, value](uint64_t min, uint64_t max) { return whole(name, value, min, max); };
  if (is("--unix")) options.unixPath = value;
  else if (is("--host")) options.host = value;
  else if (is("--port")) options.port = value;
  else if (is("--export")) options.exportName = value;
  else if (is("--connections")) options.connections = number(1, kConnectionsMax);
  else if (is("--depth")) options.depth = number(1, kDepthMax);
  else if (is("--block")) options.blockBytes = number(1, kBlockBytesMax);
  else if (is("--order")) options.order = parseOrder(value);
  else if (is("--reads")) options.readPercent = number(0, 100);
  else if (is("--flush-every")) options.flushEvery = number(0, UINT32_MAX);
  else if (is("--warmup-ms")) options.warmupMs = number(0, kTimeMsMax);
  else if (is("--duration-ms")) options.durationMs = number(0, kTimeMsMax);
  else if (is("--count")) options.count = number(0, kWholeMax);
  else if (is("--seed")) options.seed = number(0, kWholeMax);
  else if (is("--offset")) options.offset = number(0, kWholeMax);
  else if (is("--length")) options.length = number(0, kWholeMax);
  else if (is("--stride")) options.strideBytes = number(0, kWholeMax);
  else if (is("--timeout-ms")) options.timeoutMs = number(1, kTimeMsMax);
  else if (is("--lap")) options.lap = number(0, 1) == 1;
  else if (is("--verify")) options.verify = number(0, 1) == 1;
  else if (is("--structured")) options.structured = number(0, 1) == 1;
  else if (is("--hold")) options.hold = number(0, 1) == 1;
  else wrongUsage("%s is no option", name);
}

}  // namespace

Options parseOptions(int count, char** words) {
  Options options;
  for (int index = 1; index < count; index += 2) {
    if (index + 1 == count) wrongUsage("%s takes a value", words[index]);
    parseOption(options, words[index], words[index + 1]);
  }
  if (options.unixPath.empty() == options.host.empty()) wrongUsage("say either --unix or --host");
  if (options.strideBytes == 0) options.strideBytes = options.blockBytes;
  if (options.strideBytes < options.blockBytes) wrongUsage("--stride is at least the size of a block");
  if (options.durationMs == 0 && options.count == 0 && !options.lap)
    wrongUsage("say when to stop: --duration-ms, --count or --lap");
  if (options.warmupMs > 0 && (options.count > 0 || options.lap))
    wrongUsage("a load by count or lap has no warm-up: everything counts");
  if (options.lap && options.order == Order::kRandom) wrongUsage("--lap needs --order shuffled or sequential");
  return options;
}

}  // namespace blockferry::load
