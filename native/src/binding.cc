// The border to JavaScript. src/native/index.ts documents what each function takes and answers; here
// arguments become plain values, and results numbers: a count or offset >= 0, or -errno. Only wrong arguments
// throw.
//
// There is no state besides three kinds of handles: a Job lives from its call to its answer, a Mapping as long
// as its ArrayBuffer, a Reader as long as its environment. The addon can be loaded by any number of worker threads.

#include <node_api.h>

#include <cerrno>
#include <climits>
#include <cmath>

#include "args.h"
#include "bitmap.h"
#include "exchange.h"
#include "reader.h"
#include "system.h"
#include "values.h"

namespace blockferry {
namespace {

// ---- Reads and writes on the calling thread

napi_value Pread(napi_env env, napi_callback_info info) {
  Args<6> args(env, info);
  const int fd = args.fd(0);
  const Bytes to = args.span(1);
  const uint64_t offset = args.whole(4, "offset");
  const bool nowait = args.flag(5, "nowait");
  if (!args.ok) return nullptr;
  return number(env, readSome(fd, to.data, to.length, offset, nowait));
}

napi_value Pwrite(napi_env env, napi_callback_info info) {
  Args<5> args(env, info);
  const int fd = args.fd(0);
  const Bytes from = args.span(1);
  const uint64_t offset = args.whole(4, "offset");
  if (!args.ok) return nullptr;
  return number(env, writeAll(fd, from.data, from.length, offset));
}

napi_value Send(napi_env env, napi_callback_info info) {
  Args<5> args(env, info);
  const int fd = args.fd(0);
  const Bytes from = args.span(1);
  const bool more = args.flag(4, "more");
  if (!args.ok) return nullptr;
  return number(env, sendSome(fd, from.data, from.length, more));
}

napi_value ReceivePayload(napi_env env, napi_callback_info info) {
  Args<5> args(env, info);
  const int fd = args.fd(0);
  const Bytes to = args.span(1);
  const auto turnUs = static_cast<double>(args.whole(4, "turnUs", UINT32_MAX));
  uv_loop_t* loop = nullptr;
  if (!args.ok) return nullptr;
  if (napi_get_uv_event_loop(env, &loop) != napi_ok) return failed(env, "no event loop");
  return number(env, static_cast<int64_t>(receivePayload(loop, fd, to.data, to.length, turnUs)));
}

// Whether `value` is a whole number in 0..max.
bool isWithin(double value, double max) { return value >= 0 && value <= max && value == std::floor(value); }

bool isJob(const ExchangeJob& job, size_t inBytes, size_t outBytes) {
  constexpr double kFdMax = INT_MAX;
  constexpr double kSplitBytesMinMin = 128;
  return (job.socket == -1 || isWithin(job.socket, kFdMax)) && isWithin(job.image, kFdMax) &&
         isWithin(job.imageBytes, static_cast<double>(kWholeMax)) && isWithin(job.access, 7) && isWithin(job.form, 2) &&
         isWithin(job.readBytesMax, UINT32_MAX) && isWithin(job.writeBytesMax, UINT32_MAX) &&
         isWithin(job.repliesMax - 1, UINT32_MAX) && isWithin(job.receiveBytesMax - 1, UINT32_MAX) &&
         (job.pollUs == -1 || isWithin(job.pollUs, UINT32_MAX)) && isWithin(job.turnUs, UINT32_MAX) &&
         (job.splitBytesMin == 0 || isWithin(job.splitBytesMin - kSplitBytesMinMin, UINT32_MAX)) &&
         isWithin(job.end, static_cast<double>(inBytes)) && isWithin(job.at, job.end) &&
         isWithin(job.outTo, static_cast<double>(outBytes)) && isWithin(job.outFrom, job.outTo);
}

napi_value Exchange(napi_env env, napi_callback_info info) {
  Args<6> args(env, info);
  napi_typedarray_type type;
  size_t fields = 0;
  void* data = nullptr;
  uv_loop_t* loop = nullptr;
  if (!args.ok) return nullptr;
  if (napi_get_typedarray_info(env, args[0], &type, &fields, &data, nullptr, nullptr) != napi_ok ||
      type != napi_float64_array || fields * sizeof(double) != sizeof(ExchangeJob)) {
    napi_throw_type_error(env, "ERR_INVALID_ARG_TYPE", "job must be a Float64Array with a place for each field");
    return nullptr;
  }
  const Bytes in = args.bytes(1, "input");
  const Bytes out = args.bytes(2, "output");
  napi_valuetype kind = napi_null;
  if (args.ok) napi_typeof(env, args[3], &kind);
  const Bytes present = kind == napi_null ? Bytes{} : args.bytes(3, "present");
  // The last two may be absent.
  const auto given = [&](int index) {
    napi_valuetype of = napi_null;
    if (args.ok) napi_typeof(env, args[index], &of);
    return of != napi_null && of != napi_undefined;
  };
  const bool counts = given(4);
  const Bytes heat = counts ? args.bytes(4, "heat") : Bytes{};
  const bool tracks = given(5);
  const Bytes dirty = tracks ? args.bytes(5, "dirty") : Bytes{};
  if (!args.ok) return nullptr;
  auto* job = static_cast<ExchangeJob*>(data);
  if (!isJob(*job, in.length, out.length) ||
      (counts && heat.length < heatBytes(static_cast<uint64_t>(job->imageBytes)))) {
    napi_throw_range_error(env, "ERR_OUT_OF_RANGE", "a field of the job is out of its range");
    return nullptr;
  }
  if (napi_get_uv_event_loop(env, &loop) != napi_ok) return failed(env, "no event loop");
  // An empty bitmap has a bit for no block, and may have no address.
  static constexpr uint8_t kNoBits = 0;
  const uint8_t* bits = kind == napi_null ? nullptr : present.length == 0 ? &kNoBits : present.data;
  static uint8_t noDirtyBits = 0;
  uint8_t* dirtyBits = !tracks ? nullptr : dirty.length == 0 ? &noDirtyBits : dirty.data;
  const Ending ending = exchange(loop, *job, in.data, in.length, out.data, out.length, bits, present.length,
                                 Heat{counts ? heat.data : nullptr}, dirtyBits, dirty.length);
  return number(env, static_cast<int64_t>(ending));
}

// ---- Shared mappings

// Two own it: the memory's finalizer (the ArrayBuffer's storage is gone) and the wrapped ArrayBuffer object,
// by which `unmap` finds it. Both run on the thread of their environment.
struct Mapping {
  void* address;  // nullptr once unmapped
  size_t length;
  int owners;
};

// 2 GiB: the presence map of a 64 TiB volume.
constexpr uint64_t kMapBytesMax = uint64_t{1} << 31;
constexpr napi_type_tag kMappingTag = {0x626c6f636b666572, 0x72792d6d61707069};

void release(Mapping* mapping) {
  if (--mapping->owners == 0) delete mapping;
}

void unmapNow(Mapping* mapping) {
  if (mapping->address != nullptr) unmap(mapping->address, mapping->length);
  mapping->address = nullptr;
}

void storageGone(napi_env, void*, void* hint) {
  unmapNow(static_cast<Mapping*>(hint));
  release(static_cast<Mapping*>(hint));
}

void wrapperGone(napi_env, void* data, void*) { release(static_cast<Mapping*>(data)); }

bool isMapping(napi_env env, napi_value arrayBuffer) {
  bool tagged = false;
  return napi_check_object_type_tag(env, arrayBuffer, &kMappingTag, &tagged) == napi_ok && tagged;
}

napi_value MapShared(napi_env env, napi_callback_info info) {
  Args<2> args(env, info);
  const int fd = args.fd(0);
  const uint64_t length = args.whole(1, "length", kMapBytesMax);
  if (!args.ok) return nullptr;
  void* address = nullptr;
  if (const int64_t result = mapShared(fd, length, &address); result < 0) return number(env, result);
  auto* mapping = new Mapping{address, length, 1};
  napi_value arrayBuffer;
  // If it fails, Node may have called the finalizer already: leave the mapping to it.
  if (napi_create_external_arraybuffer(env, address, length, storageGone, mapping, &arrayBuffer) != napi_ok) {
    return failed(env, "no external ArrayBuffer");
  }
  if (napi_wrap(env, arrayBuffer, mapping, wrapperGone, nullptr, nullptr) != napi_ok) return failed(env, "no wrap");
  mapping->owners++;
  napi_value view;
  if (napi_type_tag_object(env, arrayBuffer, &kMappingTag) != napi_ok ||
      napi_create_typedarray(env, napi_uint8_array, length, arrayBuffer, 0, &view) != napi_ok) {
    return failed(env, "no Uint8Array");
  }
  return view;
}

napi_value Unmap(napi_env env, napi_callback_info info) {
  Args<1> args(env, info);
  napi_value arrayBuffer = nullptr;
  args.bytes(0, "view", &arrayBuffer);
  if (!args.ok) return nullptr;
  void* data = nullptr;
  if (!isMapping(env, arrayBuffer) || napi_unwrap(env, arrayBuffer, &data) != napi_ok) {
    napi_throw_type_error(env, "ERR_INVALID_ARG_VALUE", "view is not of mapShared");
    return nullptr;
  }
  bool detached = false;
  napi_is_detached_arraybuffer(env, arrayBuffer, &detached);
  // Detached by us: done. By ArrayBuffer.transfer(): the memory is somebody else's now, and goes with it.
  if (detached) return nullptr;
  if (napi_detach_arraybuffer(env, arrayBuffer) != napi_ok) return failed(env, "the ArrayBuffer cannot be detached");
  unmapNow(static_cast<Mapping*>(data));
  return nullptr;
}

// ---- What takes its time: on libuv's pool, answered by a promise

enum class Task { kRead, kWrite, kPunchHole, kZeroRange, kZeroFast, kAllocate, kSyncData };

struct Job {
  Task task;
  int fd;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint8_t* data = nullptr;
  bool keepHole = false;
  int64_t result = -ECANCELED;
  napi_async_work work = nullptr;
  napi_deferred deferred = nullptr;
  napi_ref buffer = nullptr;  // keeps the memory under a read or write
};

int64_t run(const Job& job) {
  switch (job.task) {
    case Task::kRead: return readAll(job.fd, job.data, job.length, job.offset);
    case Task::kWrite: return writeAll(job.fd, job.data, job.length, job.offset);
    case Task::kPunchHole: return punchHole(job.fd, job.offset, job.length);
    case Task::kZeroRange: return zeroRange(job.fd, job.offset, job.length, job.keepHole);
    case Task::kZeroFast: return zeroFast(job.fd, job.offset, job.length, job.keepHole);
    case Task::kAllocate: return allocate(job.fd, job.offset, job.length);
    case Task::kSyncData: return syncData(job.fd);
  }
  return -ENOSYS;
}

void execute(napi_env, void* data) {
  auto* job = static_cast<Job*>(data);
  job->result = run(*job);
}

void discard(napi_env env, Job* job) {
  if (job->buffer != nullptr) napi_delete_reference(env, job->buffer);
  if (job->work != nullptr) napi_delete_async_work(env, job->work);
  delete job;
}

void complete(napi_env env, napi_status, void* data) {
  auto* job = static_cast<Job*>(data);
  // Fails only when the environment is going down, and then nobody waits.
  napi_resolve_deferred(env, job->deferred, number(env, job->result));
  discard(env, job);
}

napi_value start(napi_env env, const Job& wanted, napi_value buffer = nullptr) {
  auto* job = new Job(wanted);
  napi_value name;
  napi_value promise;
  if ((buffer != nullptr && napi_create_reference(env, buffer, 1, &job->buffer) != napi_ok) ||
      napi_create_string_latin1(env, "blockferry", NAPI_AUTO_LENGTH, &name) != napi_ok ||
      napi_create_async_work(env, nullptr, name, execute, complete, job, &job->work) != napi_ok ||
      napi_create_promise(env, &job->deferred, &promise) != napi_ok ||
      napi_queue_async_work(env, job->work) != napi_ok) {
    discard(env, job);
    return failed(env, "no asynchronous work");
  }
  return promise;
}

napi_value transfer(napi_env env, napi_callback_info info, Task task) {
  Args<5> args(env, info);
  Job job = {.task = task, .fd = args.fd(0)};
  napi_value arrayBuffer = nullptr;
  const Bytes bytes = args.span(1, &arrayBuffer);
  job.offset = args.whole(4, "offset");
  if (!args.ok) return nullptr;
  // `unmap` would take the memory away under the pool's thread.
  if (isMapping(env, arrayBuffer)) {
    napi_throw_type_error(env, "ERR_INVALID_ARG_VALUE", "buffer must not be of mapShared");
    return nullptr;
  }
  job.data = bytes.data;
  job.length = bytes.length;
  return start(env, job, args[1]);
}

napi_value overRange(napi_env env, napi_callback_info info, Task task) {
  Args<4> args(env, info);
  Job job = {.task = task, .fd = args.fd(0)};
  job.offset = args.whole(1, "offset");
  job.length = args.whole(2, "length");
  if (task == Task::kZeroRange || task == Task::kZeroFast) job.keepHole = args.flag(3, "keepHole");
  return args.ok ? start(env, job) : nullptr;
}

napi_value ReadAsync(napi_env env, napi_callback_info info) { return transfer(env, info, Task::kRead); }
napi_value WriteAsync(napi_env env, napi_callback_info info) { return transfer(env, info, Task::kWrite); }
napi_value PunchHole(napi_env env, napi_callback_info info) { return overRange(env, info, Task::kPunchHole); }
napi_value ZeroRange(napi_env env, napi_callback_info info) { return overRange(env, info, Task::kZeroRange); }
napi_value ZeroFast(napi_env env, napi_callback_info info) { return overRange(env, info, Task::kZeroFast); }
napi_value Allocate(napi_env env, napi_callback_info info) { return overRange(env, info, Task::kAllocate); }

napi_value SyncData(napi_env env, napi_callback_info info) {
  Args<1> args(env, info);
  const Job job = {.task = Task::kSyncData, .fd = args.fd(0)};
  return args.ok ? start(env, job) : nullptr;
}

// ---- Descriptors

template <int64_t (*Call)(int, uint64_t)>
napi_value Seek(napi_env env, napi_callback_info info) {
  Args<2> args(env, info);
  const int fd = args.fd(0);
  const uint64_t offset = args.whole(1, "offset");
  return args.ok ? number(env, Call(fd, offset)) : nullptr;
}

template <int64_t (*Call)(int)>
napi_value OnFd(napi_env env, napi_callback_info info) {
  Args<1> args(env, info);
  const int fd = args.fd(0);
  return args.ok ? number(env, Call(fd)) : nullptr;
}

napi_value SendBuffer(napi_env env, napi_callback_info info) {
  Args<2> args(env, info);
  const int fd = args.fd(0);
  const uint64_t bytes = args.whole(1, "bytes");
  return args.ok ? number(env, sendBuffer(fd, bytes)) : nullptr;
}

napi_value LockFile(napi_env env, napi_callback_info info) {
  Args<2> args(env, info);
  const int fd = args.fd(0);
  const bool exclusive = args.flag(1, "exclusive");
  return args.ok ? number(env, lockFile(fd, exclusive)) : nullptr;
}

napi_value SocketPair(napi_env env, napi_callback_info) {
  int pair[2];
  if (const int64_t result = socketPair(pair); result < 0) return number(env, result);
  napi_value both;
  if (napi_create_array_with_length(env, 2, &both) != napi_ok ||
      napi_set_element(env, both, 0, number(env, pair[0])) != napi_ok ||
      napi_set_element(env, both, 1, number(env, pair[1])) != napi_ok) {
    closeFd(pair[0]);
    closeFd(pair[1]);
    return failed(env, "no array");
  }
  return both;
}

// ---- Bitmaps

template <typename Byte, uint64_t (*Call)(Byte*, uint64_t, uint64_t)>
napi_value OnBitmap(napi_env env, napi_callback_info info) {
  Args<3> args(env, info);
  const Bytes map = args.bytes(0, "map");
  const uint64_t to = args.whole(2, "to", map.length * 8);
  const uint64_t from = args.whole(1, "from", to);
  return args.ok ? number(env, static_cast<int64_t>(Call(map.data, from, to))) : nullptr;
}

napi_value OrInto(napi_env env, napi_callback_info info) {
  Args<2> args(env, info);
  const Bytes map = args.bytes(0, "map");
  const Bytes other = args.bytes(1, "other");
  if (!args.ok) return nullptr;
  if (map.length != other.length) {
    napi_throw_range_error(env, "ERR_OUT_OF_RANGE", "the maps are not of one length");
    return nullptr;
  }
  orInto(map.data, other.data, map.length);
  return nullptr;
}

constexpr napi_property_descriptor method(const char* name, napi_callback call) {
  return {name, nullptr, call, nullptr, nullptr, nullptr, napi_enumerable, nullptr};
}

constexpr napi_property_descriptor kMethods[] = {
    method("pread", Pread),
    method("pwrite", Pwrite),
    method("readAsync", ReadAsync),
    method("writeAsync", WriteAsync),
    method("send", Send),
    method("receivePayload", ReceivePayload),
    method("exchange", Exchange),
    method("openReader", OpenReader),
    method("queueRead", QueueRead),
    method("beginReads", BeginReads),
    method("punchHole", PunchHole),
    method("zeroRange", ZeroRange),
    method("zeroFast", ZeroFast),
    method("allocate", Allocate),
    method("fdatasync", SyncData),
    method("seekData", Seek<seekData>),
    method("seekHole", Seek<seekHole>),
    method("seekEnd", OnFd<seekEnd>),
    method("peerGone", OnFd<peerGone>),
    method("sendBuffer", SendBuffer),
    method("lockFile", LockFile),
    method("mapShared", MapShared),
    method("unmap", Unmap),
    method("dup", OnFd<duplicate>),
    method("closeFd", OnFd<closeFd>),
    method("socketPair", SocketPair),
    method("countOnes", OnBitmap<const uint8_t, countOnes>),
    method("nextZero", OnBitmap<const uint8_t, nextZero>),
    method("nextOne", OnBitmap<const uint8_t, nextOne>),
    method("setRange", OnBitmap<uint8_t, setRange>),
    method("clearRange", OnBitmap<uint8_t, clearRange>),
    method("orInto", OrInto),
};

}  // namespace
}  // namespace blockferry

NAPI_MODULE_INIT() {
  using blockferry::kMethods;
  if (napi_define_properties(env, exports, sizeof kMethods / sizeof kMethods[0], kMethods) != napi_ok) return nullptr;
  return exports;
}
