#include "reader.h"

#include <uv.h>

#include <algorithm>
#include <memory>

#include "args.h"
#include "ring.h"
#include "values.h"

namespace blockferry {
namespace {

// Its end: the environment's hook waits for the reads that are under way (their memory is about to go), then closes the poll.
struct Reader {
  napi_env env;
  Ring ring;
  uv_poll_t poll;
  napi_ref results = nullptr;  // Int32Array: slot and result of each read that ended
  napi_ref ended = nullptr;    // called with their number
  napi_async_context context = nullptr;
  napi_async_cleanup_hook_handle hook = nullptr;
};

constexpr uint32_t kReaderEntriesMax = 4096;
constexpr size_t kReapedMax = 64;
constexpr napi_type_tag kReaderTag = {0x626c6f636b666572, 0x72792d7265616472};

// Leaves an exception of `ended` to the environment, which ends it as any uncaught one.
void tellEnded(Reader* reader, size_t count) {
  napi_env env = reader->env;
  napi_value ended;
  napi_value receiver;
  napi_value result;
  const napi_value argument = number(env, static_cast<int64_t>(count));
  if (napi_get_reference_value(env, reader->ended, &ended) != napi_ok || napi_get_global(env, &receiver) != napi_ok)
    return;
  if (napi_make_callback(env, reader->context, receiver, ended, 1, &argument, &result) != napi_pending_exception) return;
  napi_value error;
  if (napi_get_and_clear_last_exception(env, &error) == napi_ok) napi_fatal_exception(env, error);
}

void reaped(uv_poll_t* poll, int, int) {
  auto* reader = static_cast<Reader*>(poll->data);
  Completion completions[kReapedMax];
  for (;;) {
    const size_t count = reader->ring.reap(completions, kReapedMax);
    if (!reader->ring.busy()) uv_unref(reinterpret_cast<uv_handle_t*>(poll));
    if (count == 0) return;
    napi_handle_scope scope;
    if (napi_open_handle_scope(reader->env, &scope) != napi_ok) return;
    napi_value results;
    void* data = nullptr;
    size_t length = 0;
    if (napi_get_reference_value(reader->env, reader->results, &results) == napi_ok &&
        napi_get_typedarray_info(reader->env, results, nullptr, &length, &data, nullptr, nullptr) == napi_ok &&
        length >= 2 * count) {
      auto* pairs = static_cast<int32_t*>(data);
      for (size_t index = 0; index < count; index++) {
        pairs[2 * index] = static_cast<int32_t>(completions[index].slot);
        pairs[2 * index + 1] = completions[index].result;
      }
      tellEnded(reader, count);
    }
    napi_close_handle_scope(reader->env, scope);
    if (count < kReapedMax) return;
  }
}

void discardReader(Reader* reader) {
  if (reader->results != nullptr) napi_delete_reference(reader->env, reader->results);
  if (reader->ended != nullptr) napi_delete_reference(reader->env, reader->ended);
  if (reader->context != nullptr) napi_async_destroy(reader->env, reader->context);
  if (reader->hook != nullptr) napi_remove_async_cleanup_hook(reader->hook);
  delete reader;
}

void endReader(napi_async_cleanup_hook_handle, void* data) {
  auto* reader = static_cast<Reader*>(data);
  reader->ring.drain();
  uv_close(reinterpret_cast<uv_handle_t*>(&reader->poll),
           [](uv_handle_t* handle) { discardReader(static_cast<Reader*>(handle->data)); });
}

Reader* readerOf(napi_env env, napi_value handle) {
  bool tagged = false;
  void* data = nullptr;
  if (napi_check_object_type_tag(env, handle, &kReaderTag, &tagged) == napi_ok && tagged &&
      napi_get_value_external(env, handle, &data) == napi_ok)
    return static_cast<Reader*>(data);
  napi_throw_type_error(env, "ERR_INVALID_ARG_TYPE", "reader must be of openReader");
  return nullptr;
}

}  // namespace

napi_value OpenReader(napi_env env, napi_callback_info info) {
  Args<3> args(env, info);
  const uint64_t entries = args.whole(0, "entries", kReaderEntriesMax);
  napi_typedarray_type type;
  size_t length = 0;
  if (!args.ok) return nullptr;
  if (napi_get_typedarray_info(env, args[1], &type, &length, nullptr, nullptr, nullptr) != napi_ok ||
      type != napi_int32_array || length < 2 * kReapedMax) {
    napi_throw_type_error(env, "ERR_INVALID_ARG_TYPE", "results must be an Int32Array of 128 or more");
    return nullptr;
  }
  napi_valuetype kind;
  if (napi_typeof(env, args[2], &kind) != napi_ok || kind != napi_function) {
    napi_throw_type_error(env, "ERR_INVALID_ARG_TYPE", "ended must be a function");
    return nullptr;
  }
  auto reader = std::make_unique<Reader>();
  reader->env = env;
  if (const int64_t result = reader->ring.open(static_cast<uint32_t>(entries)); result < 0) return number(env, result);
  napi_value name;
  napi_value handle;
  uv_loop_t* loop = nullptr;
  if (napi_create_string_latin1(env, "blockferry", NAPI_AUTO_LENGTH, &name) != napi_ok ||
      napi_get_uv_event_loop(env, &loop) != napi_ok || napi_async_init(env, nullptr, name, &reader->context) != napi_ok ||
      napi_create_reference(env, args[1], 1, &reader->results) != napi_ok ||
      napi_create_reference(env, args[2], 1, &reader->ended) != napi_ok ||
      napi_create_external(env, reader.get(), nullptr, nullptr, &handle) != napi_ok ||
      napi_type_tag_object(env, handle, &kReaderTag) != napi_ok || uv_poll_init(loop, &reader->poll, reader->ring.eventFd()) != 0) {
    discardReader(reader.release());
    return failed(env, "no reader");
  }
  reader->poll.data = reader.get();
  Reader* opened = reader.release();
  napi_add_async_cleanup_hook(env, endReader, opened, &opened->hook);
  uv_unref(reinterpret_cast<uv_handle_t*>(&opened->poll));
  uv_poll_start(&opened->poll, UV_READABLE, reaped);
  return handle;
}

napi_value QueueRead(napi_env env, napi_callback_info info) {
  Args<8> args(env, info);
  Reader* reader = readerOf(env, args[0]);
  if (reader == nullptr) return nullptr;
  const uint64_t slot = args.whole(1, "slot", kReaderEntriesMax);
  const int fd = args.fd(2);
  napi_value arrayBuffer = nullptr;
  const Bytes to = args.span(3, &arrayBuffer);
  const uint64_t offset = args.whole(6, "offset");
  const bool elsewhere = args.flag(7, "elsewhere");
  if (!args.ok) return nullptr;
  const auto length = static_cast<uint32_t>(std::min<uint64_t>(to.length, INT32_MAX));
  uv_ref(reinterpret_cast<uv_handle_t*>(&reader->poll));  // while reads are under way there is something to wait for
  return number(env, reader->ring.read(static_cast<uint32_t>(slot), fd, to.data, length, offset, elsewhere) ? 0 : -EAGAIN);
}

napi_value BeginReads(napi_env env, napi_callback_info info) {
  Args<1> args(env, info);
  Reader* reader = readerOf(env, args[0]);
  return reader == nullptr ? nullptr : number(env, reader->ring.submit());
}

}  // namespace blockferry
