// blockferry-load: loads an NBD server from one thread and prints one line of JSON. src/bench/load.ts starts it and says what its words
// and its result mean.

#include <sys/prctl.h>
#include <unistd.h>

#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <ctime>

#include "load.h"
#include "wire.h"

namespace blockferry::load {
namespace {

void printLatency(const char* name, const Histogram& ns) {
  std::printf(",\"%s\":{\"count\":%" PRIu64 ",\"mean\":%" PRIu64 ",\"p50\":%" PRIu64 ",\"p99\":%" PRIu64
              ",\"p999\":%" PRIu64 ",\"max\":%" PRIu64 "}",
              name, ns.total(), ns.mean(), ns.quantile(0.5), ns.quantile(0.99), ns.quantile(0.999), ns.max());
}

void print(const Report& report, const Export& target) {
  std::printf("{\"exportBytes\":%" PRIu64 ",\"multiConn\":%s,\"structured\":%s", target.sizeBytes,
              (target.flags & kFlagMultiConn) != 0 ? "true" : "false", target.structured ? "true" : "false");
  std::printf(",\"elapsedNs\":%" PRId64 ",\"cpuNs\":%" PRId64, report.elapsedNs, report.cpuNs);
  std::printf(",\"reads\":%" PRIu64 ",\"writes\":%" PRIu64 ",\"flushes\":%" PRIu64 ",\"bytes\":%" PRIu64, report.reads,
              report.writes, report.flushes, report.bytes);
  Histogram all = report.readNs;
  all.add(report.writeNs);
  printLatency("latencyNs", all);
  printLatency("readNs", report.readNs);
  printLatency("writeNs", report.writeNs);
  printLatency("flushNs", report.flushNs);
  std::printf(",\"totalReads\":%" PRIu64 ",\"totalWrites\":%" PRIu64 ",\"totalFlushes\":%" PRIu64
              ",\"verifiedReads\":%" PRIu64 "}\n",
              report.totalReads, report.totalWrites, report.totalFlushes, report.verifiedReads);
  std::fflush(stdout);
}

void waitForEndOfInput() {
  char byte;
  while (::read(STDIN_FILENO, &byte, 1) > 0) continue;
}

int run(int count, char** words) {
  // Nobody is interested any more when the one who started it is gone.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const Options options = parseOptions(count, words);
  Load load(options);
  print(load.run(), load.target());
  if (options.hold) waitForEndOfInput();
  load.disconnect();
  return 0;
}

}  // namespace
}  // namespace blockferry::load

int main(int count, char** words) { return blockferry::load::run(count, words); }
