// The transformed input of a layer by itself: for prompts, budgets and counting, which need it in memory.
#include "input.cuh"
#include "kernels.h"
#include "product.h"
#include "ptx.h"

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

// The row's outputs in the order of the stored channels.
__device__ __forceinline__ void gather(const PrepareParams& p, const std::uint16_t* outputs) {
  const int k = static_cast<int>(p.k), steps = static_cast<int>(product_steps(p.k));
  const bool whole_order = reinterpret_cast<std::uintptr_t>(p.order) % 16 == 0;
  for (int group = threadIdx.x; group < 8 * steps; group += kThreads) {
    alignas(16) std::uint16_t bits[kTogether];
    const int first = group * kTogether;
    if (first + kTogether <= k && whole_order) {
      int order[kTogether];
      *reinterpret_cast<int4*>(order) = __ldg(reinterpret_cast<const int4*>(p.order + first));
      *reinterpret_cast<int4*>(order + 4) = __ldg(reinterpret_cast<const int4*>(p.order + first + 4));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) bits[i] = outputs[order[i]];
    } else {
      for (int i = 0; i < kTogether; ++i) bits[i] = first + i < k ? outputs[p.order[first + i]] : std::uint16_t{0};
    }
    const std::int64_t to = product_input(blockIdx.x, group, steps, p.tile_rows);
    *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(p.out) + to) = *reinterpret_cast<const uint4*>(bits);
  }
}

template <int kCount>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareParams p) {
  extern __shared__ uint4 row[];  // where the outputs are put into order
  __shared__ float groups[kNormGroups];
  const bool ordered = p.order != nullptr;
  if (ordered) ptx::launch_dependents();  // the product begins with the codes
  ptx::wait_for_previous_kernel();
  const std::int64_t first = blockIdx.x * p.x_stride, to = blockIdx.x * p.k;
  const int k = static_cast<int>(p.k);
  float factor = 1;
  if (p.transform.norm_weight) {
    sum_squares<kThreads>(p.x, first, k, p.dtype, groups);
    __syncthreads();
    factor = norm_factor(groups, k, p.transform.norm_eps);
  }
  for (int j = threadIdx.x * kCount; j < k; j += kThreads * kCount) {
    Numbers<kCount> value = load<kCount>(p.x, first + j, p.dtype);
    if (p.transform.gated) {
      const Numbers<kCount> up = load<kCount>(p.x, first + k + j, p.dtype);
#pragma unroll
      for (int n = 0; n < kCount; ++n) value.of[n] = gated_silu(value.of[n], up.of[n], p.dtype);
    } else if (p.transform.norm_weight) {
      const Numbers<kCount> weight = load<kCount>(p.transform.norm_weight, j, p.dtype);
#pragma unroll
      for (int n = 0; n < kCount; ++n) value.of[n] = normed(value.of[n], factor, weight.of[n], p.dtype);
    }
    store<kCount>(ordered ? row : p.out, ordered ? j : to + j, p.dtype, value);
  }
  if (!ordered) return;
  __syncthreads();
  gather(p, reinterpret_cast<const std::uint16_t*>(row));
}

}  // namespace

Status prepare(const PrepareParams& params, cudaStream_t stream) {
  const bool ordered = params.order != nullptr;
  if (params.transform.nothing() && !ordered) {
    return error("neither a norm nor a gate is given: one of them must be");
  }
  if (Status status = check_transform(params.transform); !status.ok()) return status;
  if (params.m == 0 || params.k == 0) return {};
  const auto kernel = is_aligned(params) ? prepare_kernel<kTogether> : prepare_kernel<1>;
  const int shared = ordered ? static_cast<int>(params.k) * 2 : 0;
  if (shared > 0) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.m));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = params.overlap ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params);
  return launched("prepare");
}

}  // namespace grinqh::cuda
