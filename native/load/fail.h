// The ends of this program: one line on stderr, exit code 1, or 2 for wrong words.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace blockferry::load {

[[noreturn]] inline void leave(int code, const char* format, va_list values) {
  std::vfprintf(stderr, format, values);
  std::fputc('\n', stderr);
  std::exit(code);
}

[[noreturn]] [[gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  leave(1, format, values);
}

[[noreturn]] [[gnu::format(printf, 1, 2)]] inline void wrongUsage(const char* format, ...) {
  va_list values;
  va_start(values, format);
  leave(2, format, values);
}

}  // namespace blockferry::load
