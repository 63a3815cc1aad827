// What a layer does to its input itself: the RMS norm or gated SiLU of grinqh/types.h, as cpp/core/prepare.cpp
// specifies them.
#pragma once
#include "device.cuh"

namespace grinqh::cuda {

__device__ __forceinline__ float rounded(float value, Dtype dtype) {
  const float half = __half2float(__float2half_rn(value)), brain = __bfloat162float(__float2bfloat16_rn(value));
  return dtype == Dtype::f16 ? half : (dtype == Dtype::bf16 ? brain : value);
}

__device__ __forceinline__ float gated_silu(float gate, float value, Dtype dtype) {
  return rounded(rounded(gate / (1.0f + expf(-gate)), dtype) * value, dtype);
}

__device__ __forceinline__ float normed(float value, float factor, float weight, Dtype dtype) {
  return rounded(rounded(value * factor, dtype) * weight, dtype);
}

inline constexpr int kNormGroups = kNormLanes / 32;

// The sums of squares of a row's lanes, by groups of 32, in `groups`; all threads of a block of kThreads take part, and
// need a barrier afterwards.
template <int kThreads>
__device__ __forceinline__ void sum_squares(const void* x, std::int64_t first, int k, Dtype dtype,
                                            float (&groups)[kNormGroups]) {
  static_assert(kNormLanes % kThreads == 0 && kThreads % 32 == 0);
#pragma unroll
  for (int part = 0; part < kNormLanes / kThreads; ++part) {
    const int lane = part * kThreads + static_cast<int>(threadIdx.x);
    float sum = 0;
#pragma unroll 4
    for (int j = lane; j < k; j += kNormLanes) {
      const float value = load_number(x, first + j, dtype);
      sum = __fadd_rn(sum, __fmul_rn(value, value));
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, apart));
    if (lane % 32 == 0) groups[lane / 32] = sum;
  }
}

__device__ __forceinline__ float norm_factor(const float (&groups)[kNormGroups], int k, float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kNormGroups; ++i) sum = __fadd_rn(sum, groups[i]);
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(k)), eps));
}

}  // namespace grinqh::cuda
