// Bindings of a queue of reads (ring.h): src/native/index.ts documents them.
#pragma once

#include <node_api.h>

namespace blockferry {

napi_value OpenReader(napi_env env, napi_callback_info info);
napi_value QueueRead(napi_env env, napi_callback_info info);
napi_value BeginReads(napi_env env, napi_callback_info info);

}  // namespace blockferry
