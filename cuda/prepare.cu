// The transformed input of a layer by itself: for prompts, budgets and counting, which need it in memory.
#include "input.cuh"
#include "kernels.h"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = kNormLanes;
constexpr int kTogether = 8;  // numbers of 16 bits in 16 bytes

// Whether rows can be read and written 16 bytes at a time.
bool is_aligned(const PrepareParams& p) {
  const auto whole = [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; };
  return p.dtype != Dtype::f32 && p.k % kTogether == 0 && p.x_stride % kTogether == 0 && whole(p.x) && whole(p.out) &&
         whole(p.transform.norm_weight);
}

// kCount numbers from element i on; eight of them are 16 bytes.
template <int kCount>
struct Numbers {
  float of[kCount];
};

template <int kCount>
__device__ __forceinline__ Numbers<kCount> load(const void* from, std::int64_t i, Dtype dtype) {
  Numbers<kCount> result;
  if constexpr (kCount == 1) {
    result.of[0] = load_number(from, i, dtype);
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(from) + i);
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      result.of[2 * w] = to_float(words[w] & 0xffff, dtype);
      result.of[2 * w + 1] = to_float(words[w] >> 16, dtype);
    }
  }
  return result;
}

template <int kCount>
__device__ __forceinline__ void store(void* to, std::int64_t i, Dtype dtype, const Numbers<kCount>& numbers) {
  if constexpr (kCount == 1) {
    store_number(to, i, dtype, numbers.of[0]);
  } else {
    alignas(16) std::uint16_t bits[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) store_number(bits, n, dtype, numbers.of[n]);
    *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(to) + i) = *reinterpret_cast<const uint4*>(bits);
  }
}

template <int kCount>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareParams p) {
  __shared__ float groups[kNormGroups];
  const std::int64_t first = blockIdx.x * p.x_stride, to = blockIdx.x * p.k;
  const int k = static_cast<int>(p.k);
  float factor = 1;
  if (p.transform.norm_weight) {
    sum_squares<kThreads>(p.x, first, k, p.dtype, groups);
    __syncthreads();
    factor = norm_factor(groups, k, p.transform.norm_eps);
  }
  for (int j = threadIdx.x * kCount; j < k; j += kThreads * kCount) {
    const Numbers<kCount> x = load<kCount>(p.x, first + j, p.dtype);
    const Numbers<kCount> other = p.transform.gated ? load<kCount>(p.x, first + k + j, p.dtype)
                                                    : load<kCount>(p.transform.norm_weight, j, p.dtype);
    Numbers<kCount> value;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      value.of[n] =
          p.transform.gated ? gated_silu(x.of[n], other.of[n], p.dtype) : normed(x.of[n], factor, other.of[n], p.dtype);
    }
    store<kCount>(p.out, to + j, p.dtype, value);
  }
}

}  // namespace

Status prepare(const PrepareParams& params, cudaStream_t stream) {
  if (params.transform.nothing()) return error("neither a norm nor a gate is given: one of them must be");
  if (Status status = check_transform(params.transform); !status.ok()) return status;
  if (params.m == 0 || params.k == 0) return {};
  const auto kernel = is_aligned(params) ? prepare_kernel<kTogether> : prepare_kernel<1>;
  kernel<<<static_cast<unsigned>(params.m), kThreads, 0, stream>>>(params);
  return launched("prepare");
}

}  // namespace grinqh::cuda
