// What several kernels share: numbers of a run-time type, and the grade of a channel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "grinqh/types.h"

namespace grinqh::cuda {

__device__ __forceinline__ float load_number(const void* from, std::int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return __half2float(static_cast<const __half*>(from)[i]);
    case Dtype::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

__device__ __forceinline__ void store_number(void* to, std::int64_t i, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f16: static_cast<__half*>(to)[i] = __float2half_rn(value); break;
    case Dtype::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value); break;
    default: static_cast<float*>(to)[i] = value;
  }
}

// The number of thresholds at or below the importance, at most `stored`. A NaN takes the last grade, so
// that it reaches the result as it would in a dense product.
__device__ __forceinline__ int grade_of(float x, float weight, const float* thresholds, float factor, int planes,
                                        int stored) {
  const float importance = fabsf(x) * weight;
  int grade = 0;
  for (int i = 0; i < planes; ++i) grade += thresholds[i] * factor <= importance;
  if (x != x) grade = planes;
  return min(grade, stored);
}

}  // namespace grinqh::cuda
