// A stand-in for CUDA's runtime and driver, with one "GPU" in the memory of the host, that is loaded before them
// (LD_PRELOAD): torch and the extension, as built for CUDA, then run on a machine without a GPU, in so far as they copy
// memory, and cast with the extension's own kernels, lane after lane. Any other kernel is an error.
//
// Streams are late: what is put into them waits until somebody waits for it, and is then done in an order of chance.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/cuda/lanes.h"
#include "../../../csrc/cuda/launches.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "stand-in for CUDA: %s\n", why);
  std::abort();
}

std::recursive_mutex mutex;  // of all that follows

// ---- Errors ----

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

// ---- Streams and events ----

using Event = std::shared_ptr<bool>;  // whether it has happened

struct Work {
  std::function<void()> body;
  Event waits_for;
  Event sets;
};

using Stream = std::deque<Work>;

// The first one is CUDA's default stream. What is kept here is never destroyed, as libraries come and go in any order.
std::vector<std::unique_ptr<Stream>>& streams() {
  static auto& all = *new std::vector<std::unique_ptr<Stream>>;
  if (all.empty()) {
    all.push_back(std::make_unique<Stream>());
  }
  return all;
}

Stream& stream_of(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy ? *streams().front() : *reinterpret_cast<Stream*>(stream);
}

Event& event_of(cudaEvent_t event) {
  return *reinterpret_cast<Event*>(event);
}

bool is_ready(const Stream& stream) {
  return !stream.empty() && (!stream.front().waits_for || *stream.front().waits_for);
}

// Does one thing of some stream. Whether there was one to do.
bool step() {
  static std::mt19937 random(1);
  std::vector<Stream*> ready;
  for (const auto& stream : streams()) {
    if (is_ready(*stream)) {
      ready.push_back(stream.get());
    }
  }
  if (ready.empty()) {
    return false;
  }
  Stream& stream = *ready[random() % ready.size()];
  const Work work = std::move(stream.front());
  stream.pop_front();
  if (work.body) {
    work.body();
  }
  if (work.sets) {
    *work.sets = true;
  }
  return true;
}

void run_until(const std::function<bool()>& is_over) {
  while (!is_over()) {
    if (!step()) {
      give_up("what is waited for never happens");
    }
  }
}

void run_all() {
  while (step()) {
  }
}

// ---- Memory ----

class Ranges {
 public:
  void add(const void* address, size_t bytes) { ends_[begin_of(address)] = begin_of(address) + bytes; }

  size_t remove(const void* address) {
    const auto found = ends_.find(begin_of(address));
    const size_t bytes = found->second - found->first;
    ends_.erase(found);
    return bytes;
  }

  bool hold(const void* address, size_t bytes) const {
    auto range = ends_.upper_bound(begin_of(address));
    return range != ends_.begin() && begin_of(address) + bytes <= (--range)->second;
  }

 private:
  static uintptr_t begin_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

  std::map<uintptr_t, uintptr_t> ends_;  // by where they begin
};

constexpr size_t kMemory = size_t{4} << 30;
Ranges on_device;
Ranges pinned;
size_t used = 0;

void* allocate(size_t bytes) {
  constexpr size_t kAlignment = 4096;
  return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
}

int64_t transfers = 0;
int64_t failing_transfer = -1;

// ---- Kernels ----

using fastopt::cuda::Items;
using fastopt::cuda::kFewItems;
using fastopt::cuda::kManyItems;

// Names by the address that stands for a kernel on the host.
std::map<const void*, std::string>& kernels() {
  static auto& all = *new std::map<const void*, std::string>;
  return all;
}

std::string readable(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return text ? text.get() : name;
}

template <class Src, class Dst, int kCapacity>
void cast_items(const Items<kCapacity>& items) {
  for (int64_t position = 0; position < items.at[items.size - 1].end; ++position) {
    const auto chunk = fastopt::cuda::chunk_at<Src, Dst>(items.at, items.size, position);
    for (int lane = 0; lane < fastopt::cuda::kLanes; ++lane) {
      fastopt::cuda::cast_chunk<Src, Dst>(chunk, lane);
    }
  }
}

// The parameters are copied, as a launch does it.
template <class Src, class Dst, int kCapacity>
std::function<void()> launched(void** arguments) {
  return [items = *static_cast<const Items<kCapacity>*>(arguments[0])] { cast_items<Src, Dst, kCapacity>(items); };
}

using Launch = std::function<void()> (*)(void** arguments);

template <class Src, class Dst>
void add_casts(std::map<std::string, Launch>& all, const std::string& src, const std::string& dst) {
  const std::string pair = "cast_items<" + src + ", " + dst + ", ";
  all[pair + std::to_string(kFewItems) + ">"] = launched<Src, Dst, kFewItems>;
  all[pair + std::to_string(kManyItems) + ">"] = launched<Src, Dst, kManyItems>;
}

template <class Src>
void add_casts_from(std::map<std::string, Launch>& all, const std::string& src) {
  add_casts<Src, float>(all, src, "float");
  add_casts<Src, double>(all, src, "double");
  add_casts<Src, fastopt::bfloat16>(all, src, "fastopt::bfloat16");
  add_casts<Src, fastopt::float16>(all, src, "fastopt::float16");
}

std::map<std::string, Launch> casts() {
  std::map<std::string, Launch> all;
  add_casts_from<float>(all, "float");
  add_casts_from<double>(all, "double");
  add_casts_from<fastopt::bfloat16>(all, "fastopt::bfloat16");
  add_casts_from<fastopt::float16>(all, "fastopt::float16");
  add_casts<char, char>(all, "char", "char");
  return all;
}

Launch cast_named(const std::string& kernel) {
  static const auto& all = *new auto(casts());
  for (const auto& [name, launch] : all) {
    if (kernel.find(name) != std::string::npos) {
      return launch;
    }
  }
  return nullptr;
}

}  // namespace

// ---- For the tests ----

API int64_t stand_in_transfers() {
  const std::scoped_lock lock(mutex);
  return transfers;
}

// Has a transfer fail, the one after so many others, and all that follow; none where that is less than none.
API void stand_in_fail_transfer(int64_t after) {
  const std::scoped_lock lock(mutex);
  failing_transfer = after < 0 ? -1 : transfers + after;
}

// ---- Kernels, as nvcc registers and launches them ----

API void __cudaRegisterFunction(void** module, const char* kernel, char* symbol, const char* name, int limit, uint3* a,
                                uint3* b, dim3* c, dim3* d, int* e) {
  using Register = void (*)(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
  static const auto real = reinterpret_cast<Register>(dlsym(RTLD_NEXT, "__cudaRegisterFunction"));
  kernels()[kernel] = name;
  real(module, kernel, symbol, name, limit, a, b, c, d, e);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* kernel) {
  *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3, dim3, void** arguments, size_t, cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  const std::string name = readable(kernels()[reinterpret_cast<const void*>(handle)]);
  const Launch launch = cast_named(name);
  if (launch == nullptr) {
    std::fprintf(stderr, "stand-in for CUDA: no kernel %.200s\n", name.c_str());
    return returned(cudaErrorInvalidDeviceFunction);
  }
  stream_of(stream).push_back({launch(arguments), nullptr, nullptr});
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  return __cudaLaunchKernel(reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel)), grid, block, arguments, shared,
                            stream);
}

// ---- The device ----

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "stand-in");
  properties->major = 9;
  properties->totalGlobalMem = kMemory;
  properties->multiProcessorCount = 1;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  const std::scoped_lock lock(mutex);
  run_all();
  return cudaSuccess;
}

API cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

API cudaError_t cudaPeekAtLastError() {
  return last_error;
}

// ---- Memory ----

API cudaError_t cudaMalloc(void** address, size_t bytes) {
  const std::scoped_lock lock(mutex);
  if (used + bytes > kMemory) {
    return returned(cudaErrorMemoryAllocation);
  }
  *address = allocate(bytes);
  on_device.add(*address, bytes);
  used += bytes;
  return cudaSuccess;
}

API cudaError_t cudaFree(void* address) {
  const std::scoped_lock lock(mutex);
  run_all();
  if (address != nullptr) {
    used -= on_device.remove(address);
    std::free(address);
  }
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::scoped_lock lock(mutex);
  *total = kMemory;
  *free = kMemory - used;
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  const std::scoped_lock lock(mutex);
  *address = allocate(bytes);
  pinned.add(*address, bytes);
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* address) {
  const std::scoped_lock lock(mutex);
  run_all();
  pinned.remove(address);
  std::free(address);
  return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  const std::scoped_lock lock(mutex);
  pinned.add(address, bytes);
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* address) {
  const std::scoped_lock lock(mutex);
  run_all();
  pinned.remove(address);
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const std::scoped_lock lock(mutex);
  *attributes = {};
  attributes->type = on_device.hold(address, 1) ? cudaMemoryTypeDevice
                     : pinned.hold(address, 1)  ? cudaMemoryTypeHost
                                                : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// As CUDA's, a transfer is done at once where the host's side is not pinned.
API cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  const bool to_device = kind != cudaMemcpyDeviceToHost;
  const bool from_device = kind != cudaMemcpyHostToDevice;
  if ((to_device && !on_device.hold(dst, bytes)) || (from_device && !on_device.hold(src, bytes))) {
    give_up("a copy leaves the memory of the device");
  }
  if (!to_device || !from_device) {
    if (failing_transfer >= 0 && transfers >= failing_transfer) {
      return returned(cudaErrorLaunchFailure);
    }
    ++transfers;
  }
  Stream& queue = stream_of(stream);
  queue.push_back({[=] { std::memcpy(dst, src, bytes); }, nullptr, nullptr});
  if ((!to_device && !pinned.hold(dst, bytes)) || (!from_device && !pinned.hold(src, bytes))) {
    run_until([&] { return queue.empty(); });
  }
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  stream_of(stream).push_back({[=] { std::memset(address, value, bytes); }, nullptr, nullptr});
  return cudaSuccess;
}

// ---- Streams ----

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const std::scoped_lock lock(mutex);
  streams();
  *stream = reinterpret_cast<cudaStream_t>(streams().emplace_back(std::make_unique<Stream>()).get());
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  run_until([&] { return stream_of(stream).empty(); });
  return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  return stream_of(stream).empty() ? cudaSuccess : returned(cudaErrorNotReady);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::scoped_lock lock(mutex);
  stream_of(stream).push_back({nullptr, event_of(event), nullptr});
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

// ---- Events ----

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event(std::make_shared<bool>(true)));
  return cudaSuccess;
}

API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::scoped_lock lock(mutex);
  event_of(event) = std::make_shared<bool>(false);
  stream_of(stream).push_back({nullptr, nullptr, event_of(event)});
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

// Now and then something has happened by the time that somebody asks.
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::scoped_lock lock(mutex);
  static uint32_t asked = 0;
  if (++asked % 2 == 0) {
    step();
  }
  return *event_of(event) ? cudaSuccess : returned(cudaErrorNotReady);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::scoped_lock lock(mutex);
  run_until([&] { return *event_of(event); });
  return cudaSuccess;
}

// ---- What torch asks of the driver ----

API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

namespace {

int refuse() {
  return 1;
}

}  // namespace

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = is_known ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(refuse);
  if (result != nullptr) {
    *result = cudaDriverEntryPointSuccess;
  }
  return cudaSuccess;
}
