// Reads the arguments of one call from JavaScript. The first wrong one leaves a TypeError or RangeError
// pending and makes `ok` false; a binding reads all it needs and checks `ok` once. Nothing is allocated
// unless something is wrong.
#pragma once

#include <node_api.h>

#include <climits>
#include <cstdint>
#include <cstdio>

namespace blockferry {

// Number.MAX_SAFE_INTEGER
constexpr uint64_t kWholeMax = (uint64_t{1} << 53) - 1;

struct Bytes {
  uint8_t* data = nullptr;
  size_t length = 0;
};

template <size_t Count>
class Args {
 public:
  Args(napi_env env, napi_callback_info info) : env_(env) {
    size_t count = Count;  // what the caller left out is undefined
    ok = napi_get_cb_info(env, info, &count, values_, nullptr, nullptr) == napi_ok;
  }

  bool ok;

  napi_value operator[](size_t index) const { return values_[index]; }

  // A whole number in 0..max.
  uint64_t whole(size_t index, const char* name, uint64_t max = kWholeMax) {
    double number = 0;
    if (napi_get_value_double(env_, values_[index], &number) != napi_ok) return wrongType(name, "a number");
    // The comparison is false for NaN as well.
    if (!(number >= 0 && number <= static_cast<double>(max))) return outOfRange(name, max);
    const uint64_t value = static_cast<uint64_t>(number);
    if (static_cast<double>(value) != number) return outOfRange(name, max);
    return value;
  }

  int fd(size_t index) { return static_cast<int>(whole(index, "fd", INT_MAX)); }

  bool flag(size_t index, const char* name) {
    bool value = false;
    if (napi_get_value_bool(env_, values_[index], &value) != napi_ok) wrongType(name, "a boolean");
    return value;
  }

  // All of a Uint8Array or Buffer. Detached ones have length 0.
  Bytes bytes(size_t index, const char* name, napi_value* arrayBuffer = nullptr) {
    napi_typedarray_type type;
    Bytes bytes;
    void* data = nullptr;
    if (napi_get_typedarray_info(env_, values_[index], &type, &bytes.length, &data, arrayBuffer, nullptr) != napi_ok ||
        type != napi_uint8_array) {
      wrongType(name, "a Uint8Array");
      return {};
    }
    bytes.data = static_cast<uint8_t*>(data);
    return bytes;
  }

  // `length` bytes from `at` on of the array: three arguments from `index` on.
  Bytes span(size_t index, napi_value* arrayBuffer = nullptr) {
    const Bytes all = bytes(index, "buffer", arrayBuffer);
    if (!ok) return {};
    const uint64_t at = whole(index + 1, "at", all.length);
    if (!ok) return {};
    const uint64_t length = whole(index + 2, "length", all.length - at);
    return {all.data + at, length};
  }

 private:
  uint64_t wrongType(const char* name, const char* wanted) {
    if (!ok) return 0;
    ok = false;
    char message[96];
    std::snprintf(message, sizeof message, "%s must be %s", name, wanted);
    napi_throw_type_error(env_, "ERR_INVALID_ARG_TYPE", message);
    return 0;
  }

  uint64_t outOfRange(const char* name, uint64_t max) {
    if (!ok) return 0;
    ok = false;
    char message[96];
    std::snprintf(message, sizeof message, "%s must be a whole number from 0 to %llu", name,
                  static_cast<unsigned long long>(max));
    napi_throw_range_error(env_, "ERR_OUT_OF_RANGE", message);
    return 0;
  }

  napi_env env_;
  napi_value values_[Count];
};

}  // namespace blockferry
