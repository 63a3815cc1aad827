#include <algorithm>
#include <compare>
#include <map>
#include <mutex>

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

// Launches that follow each other: those of a stream, or those of a stream within one capture.
struct Sequence {
  int device = 0;
  unsigned long long stream = 0, capture = 0;
  auto operator<=>(const Sequence&) const = default;
};

struct Pool {
  std::mutex mutex;
  std::map<int, Range> left;  // by device
  std::map<Sequence, Range> taken;

  cudaError_t take(int device, std::int64_t count, Range* taken_range) {
    Range& range = left[device];
    if (range.count < count) {
      Range fresh{nullptr, std::max(count, kChunk)};
      if (const cudaError_t failure = allocate_zeros(fresh.count, &fresh.begin); failure != cudaSuccess) return failure;
      range = fresh;
    }
    *taken_range = {range.begin, count};
    range.begin += count;
    range.count -= count;
    return cudaSuccess;
  }
};

Pool& pool() {
  static Pool* const instance = new Pool;  // outlives every stream
  return *instance;
}

cudaError_t sequence_of(cudaStream_t stream, Sequence* sequence) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaError_t failure = cudaGetDevice(&sequence->device);
  if (failure == cudaSuccess) failure = cudaStreamGetCaptureInfo(stream, &capturing, &capture);
  if (failure != cudaSuccess) return failure;
  if (capturing == cudaStreamCaptureStatusNone) return cudaStreamGetId(stream, &sequence->stream);
  // A capturing stream may not be asked for its id. Captures have numbers of their own, from 1, and no stream that
  // takes part in one goes away before its end.
  sequence->capture = capture;
  sequence->stream = reinterpret_cast<std::uintptr_t>(stream);
  return cudaSuccess;
}

}  // namespace

Status counters_for(cudaStream_t stream, std::int64_t count, unsigned** counters) {
  Sequence sequence;
  if (const cudaError_t failure = sequence_of(stream, &sequence); failure != cudaSuccess)
    return cuda_error("counters", failure);
  const std::lock_guard lock(pool().mutex);
  Range& range = pool().taken[sequence];
  if (range.count < count) {
    // Launches before this one may still be using what they were given.
    if (const cudaError_t failure = pool().take(sequence.device, std::max<std::int64_t>(count, 1024), &range);
        failure != cudaSuccess)
      return cuda_error("counters", failure);
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
    int major = 0, minor = 0;
    failure = cudaDeviceGetAttribute(&fresh.gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (failure == cudaSuccess)
      failure = cudaDeviceGetAttribute(&fresh.gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (failure == cudaSuccess) failure = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (failure == cudaSuccess) failure = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (failure != cudaSuccess) return cuda_error("device", failure);
    if (major < 8) return error("device %d has compute capability %d: 8.0 and later are supported", device, major);
    fresh.gpu.capability = 10 * major + minor;
    fresh.overlap = major >= 9;
    found = known.emplace(device, fresh).first;
  }
  *gpu = found->second.gpu;
  *overlap = found->second.overlap;
  return {};
}

}  // namespace grinqh::cuda
