// The transformed input of a layer by itself: for prompts, budgets and counting, which need it in memory.
#include "input.cuh"
#include "kernels.h"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = kNormLanes;

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
  for (int j = threadIdx.x; j < k; j += kThreads) {
    const float x = load_number(p.x, first + j, p.dtype);
    const float value = p.transform.gated
                            ? gated_silu(x, load_number(p.x, first + k + j, p.dtype), p.dtype)
                            : normed(x, factor, load_number(p.transform.norm_weight, j, p.dtype), p.dtype);
    store_number(p.out, to + j, p.dtype, value);
  }
}

}  // namespace

Status prepare(const PrepareParams& params, cudaStream_t stream) {
  if (params.transform.nothing()) return error("neither a norm nor a gate is given: one of them must be");
  if (Status status = check_transform(params.transform); !status.ok()) return status;
  if (params.m == 0 || params.k == 0) return {};
  prepare_kernel<<<static_cast<unsigned>(params.m), kThreads, 0, stream>>>(params);
  return launched("prepare");
}

}  // namespace grinqh::cuda
