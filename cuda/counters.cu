#include <map>
#include <mutex>
#include <utility>

#include "counters.h"

namespace grinqh::cuda {
namespace {

constexpr std::int64_t kChunk = 1 << 18;  // counters allocated at once

Status cuda_error(const char* what, cudaError_t failure) { return error("%s: %s", what, cudaGetErrorString(failure)); }

// Allocates zeroed device memory also while some stream of this thread is capturing.
cudaError_t allocate_zeros(std::int64_t count, unsigned** memory) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStream_t stream = nullptr;
  cudaError_t failure = cudaMalloc(reinterpret_cast<void**>(memory), static_cast<std::size_t>(count) * 4);
  if (failure == cudaSuccess) failure = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (failure == cudaSuccess) failure = cudaMemsetAsync(*memory, 0, static_cast<std::size_t>(count) * 4, stream);
  if (failure == cudaSuccess) failure = cudaStreamSynchronize(stream);
  if (stream) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return failure;
}

struct Range {
  unsigned* begin = nullptr;
  std::int64_t count = 0;
};

struct Pool {
  std::mutex mutex;
  std::map<int, Range> left;                                      // by device
  std::map<std::pair<int, unsigned long long>, Range> of_stream;  // by device and stream id

  cudaError_t take(int device, std::int64_t count, unsigned** counters) {
    Range& range = left[device];
    if (range.count < count) {
      Range fresh{nullptr, count > kChunk ? count : kChunk};
      if (const cudaError_t failure = allocate_zeros(fresh.count, &fresh.begin); failure != cudaSuccess) return failure;
      range = fresh;
    }
    *counters = range.begin;
    range.begin += count;
    range.count -= count;
    return cudaSuccess;
  }
};

Pool& pool() {
  static Pool* const instance = new Pool;  // outlives every stream
  return *instance;
}

}  // namespace

Status counters_for(cudaStream_t stream, std::int64_t count, unsigned** counters) {
  int device = 0;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaError_t failure = cudaGetDevice(&device);
  if (failure == cudaSuccess) failure = cudaStreamIsCapturing(stream, &capturing);
  if (failure != cudaSuccess) return cuda_error("counters", failure);
  const std::lock_guard lock(pool().mutex);
  if (capturing != cudaStreamCaptureStatusNone) {
    failure = pool().take(device, count, counters);
    return failure == cudaSuccess ? Status{} : cuda_error("counters", failure);
  }
  unsigned long long id = 0;
  if (failure = cudaStreamGetId(stream, &id); failure != cudaSuccess) return cuda_error("counters", failure);
  Range& range = pool().of_stream[{device, id}];
  if (range.count < count) {
    Range fresh{nullptr, count < 1024 ? 1024 : count};
    if (failure = pool().take(device, fresh.count, &fresh.begin); failure != cudaSuccess)
      return cuda_error("counters", failure);
    range = fresh;
  }
  *counters = range.begin;
  return {};
}

Status current_gpu(Gpu* gpu, bool* overlap) {
  struct Known {
    Gpu gpu;
    bool overlap = false;
  };
  thread_local std::map<int, Known> known;
  int device = 0;
  cudaError_t failure = cudaGetDevice(&device);
  if (failure != cudaSuccess) return cuda_error("device", failure);
  auto found = known.find(device);
  if (found == known.end()) {
    Known fresh;
    int major = 0;
    failure = cudaDeviceGetAttribute(&fresh.gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (failure == cudaSuccess)
      failure = cudaDeviceGetAttribute(&fresh.gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (failure == cudaSuccess) failure = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (failure != cudaSuccess) return cuda_error("device", failure);
    if (major < 8) return error("device %d has compute capability %d: 8.0 and later are supported", device, major);
    fresh.overlap = major >= 9;
    found = known.emplace(device, fresh).first;
  }
  *gpu = found->second.gpu;
  *overlap = found->second.overlap;
  return {};
}

}  // namespace grinqh::cuda
