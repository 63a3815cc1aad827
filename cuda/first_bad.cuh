// The first index that a kernel found fault with, in device memory, and how the host learns of it.
#pragma once
#include "device.cuh"

namespace grinqh::cuda {

using FirstBad = unsigned long long;
inline constexpr FirstBad kNoneBad = ~FirstBad{0};

__device__ __forceinline__ void report_bad(FirstBad* first, std::int64_t index) {
  atomicMin(first, static_cast<FirstBad>(index));
}

inline void clear_bad(FirstBad* first, cudaStream_t stream) { cudaMemsetAsync(first, 0xff, sizeof(FirstBad), stream); }

// Waits for the stream.
inline Status read_bad(const char* what, const FirstBad* first, cudaStream_t stream, FirstBad* result) {
  cudaMemcpyAsync(result, first, sizeof(FirstBad), cudaMemcpyDeviceToHost, stream);
  const cudaError_t failure = cudaStreamSynchronize(stream);
  return failure == cudaSuccess ? launched(what) : error("%s: %s", what, cudaGetErrorString(failure));
}

}  // namespace grinqh::cuda
