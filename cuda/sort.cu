// Sorts channels by energy. Sums run in the order of cpp/core/sort.cpp, so that ties and bits are the same.
#include <cmath>

#include "convert.h"
#include "first_bad.cuh"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = 64;

struct Workspace {
  double* importance;  // [k]
  FirstBad* bad_weight;
  FirstBad* bad_square;

  Workspace(void* memory, std::int64_t k)
      : importance(static_cast<double*>(memory)),
        bad_weight(reinterpret_cast<FirstBad*>(importance + k)),
        bad_square(bad_weight + 1) {}
};

__global__ void importance_kernel(const float* weight, const float* mean_square, std::int64_t n, std::int64_t k,
                                  Workspace work) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= k) return;
  double sum = 0;
#pragma unroll 8
  for (std::int64_t i = 0; i < n; ++i) {
    const double w = static_cast<double>(weight[i * k + j]);
    sum += w * w;
  }
  if (mean_square != nullptr) {
    if (!(mean_square[j] >= 0.0f) || isinf(mean_square[j])) report_bad(work.bad_square, j);
    sum *= static_cast<double>(mean_square[j]);
  }
  if (!isfinite(sum)) report_bad(work.bad_weight, j);
  work.importance[j] = sum;
}

// A channel's place is the number of channels that come before it.
__global__ void rank_kernel(const double* importance, std::int64_t k, std::int32_t* channel_order) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const double own = j < k ? importance[j] : 0.0;
  __shared__ double others[kThreads];
  std::int64_t before = 0;
  for (std::int64_t first = 0; first < k; first += kThreads) {
    __syncthreads();
    if (first + threadIdx.x < k) others[threadIdx.x] = importance[first + threadIdx.x];
    __syncthreads();
    const int count = static_cast<int>(k - first < kThreads ? k - first : kThreads);
    for (int i = 0; i < count; ++i) before += others[i] > own || (others[i] == own && first + i < j);
  }
  if (j < k) channel_order[before] = static_cast<std::int32_t>(j);
}

}  // namespace

std::int64_t sort_workspace_bytes(std::int64_t k) { return k * 8 + 2 * static_cast<std::int64_t>(sizeof(FirstBad)); }

Status sort_channels(const SortParams& params, void* workspace, cudaStream_t stream) {
  if (params.n < 1 || params.k < 1)
    return error("weight is [%lld, %lld]: it must be at least 1 x 1", static_cast<long long>(params.n),
                 static_cast<long long>(params.k));
  const Workspace work(workspace, params.k);
  clear_bad(work.bad_weight, stream);
  clear_bad(work.bad_square, stream);
  const auto blocks = static_cast<unsigned>((params.k + kThreads - 1) / kThreads);
  importance_kernel<<<blocks, kThreads, 0, stream>>>(params.weight, params.mean_square, params.n, params.k, work);
  FirstBad bad = kNoneBad;
  if (Status status = read_bad("sort_channels", work.bad_square, stream, &bad); !status.ok()) return status;
  if (bad != kNoneBad) return error("mean_square[%llu] is not a finite number of at least 0", bad);
  if (Status status = read_bad("sort_channels", work.bad_weight, stream, &bad); !status.ok()) return status;
  if (bad != kNoneBad)
    return error("weight has a NaN or infinite value in column %llu: allowed are finite values", bad);
  rank_kernel<<<blocks, kThreads, 0, stream>>>(work.importance, params.k, params.channel_order);
  return launched("sort_channels");
}

}  // namespace grinqh::cuda
