// What the bindings answer with.
#pragma once

#include <node_api.h>

#include <cstdint>

namespace blockferry {

inline napi_value number(napi_env env, int64_t value) {
  napi_value result = nullptr;
  napi_create_int64(env, value, &result);
  return result;
}

// For what N-API itself refuses (out of memory, environment going down).
inline napi_value failed(napi_env env, const char* what) {
  bool pending = false;
  napi_is_exception_pending(env, &pending);
  if (!pending) napi_throw_error(env, "ERR_NAPI", what);
  return nullptr;
}

}  // namespace blockferry
