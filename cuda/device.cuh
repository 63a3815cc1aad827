// What several kernels share: numbers of a run-time type, and thresholds.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "grinqh/types.h"

namespace grinqh::cuda {

// The bits of a number of a run-time type: loading and converting are apart, so that a load need not be waited for.
__device__ __forceinline__ unsigned load_bits(const void* from, std::int64_t i, Dtype dtype) {
  return dtype == Dtype::f32 ? static_cast<const unsigned*>(from)[i] : static_cast<const std::uint16_t*>(from)[i];
}

__device__ __forceinline__ float to_float(unsigned bits, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return __half2float(__ushort_as_half(static_cast<std::uint16_t>(bits)));
    case Dtype::bf16: return __uint_as_float(bits << 16);
    default: return __uint_as_float(bits);
  }
}

__device__ __forceinline__ float load_number(const void* from, std::int64_t i, Dtype dtype) {
  return to_float(load_bits(from, i, dtype), dtype);
}

__device__ __forceinline__ void store_number(void* to, std::int64_t i, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f16: static_cast<__half*>(to)[i] = __float2half_rn(value); break;
    case Dtype::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value); break;
    default: static_cast<float*>(to)[i] = value;
  }
}

// A threshold scaled to a row's budget; an infinite one stays so for every factor, 0 included.
__device__ __forceinline__ float scaled_threshold(float threshold, float factor) {
  return isinf(threshold) ? threshold : threshold * factor;
}

inline Status launched(const char* what) {
  const cudaError_t failure = cudaGetLastError();
  return failure == cudaSuccess ? Status{} : error("%s: %s", what, cudaGetErrorString(failure));
}

}  // namespace grinqh::cuda
