// Weights to codes, with the arithmetic of cpp/core/quantize.cpp step by step: every sum is one thread's, in the same
// order, and this file is compiled without fused multiply-adds. That makes the bits those of the CPU.
#include <cmath>

#include "convert.h"
#include "first_bad.cuh"

namespace grinqh::cuda {
namespace {

constexpr int kBitCounts = kCodeBits + 1;    // 0..8 bits
constexpr int kMoments = 1 + 2 * kCodeBits;  // of a channel: sum of w^2, then for 1..8 bits w * w_b and w_b^2
constexpr int kWarp = 32;                    // one warp a block: threads are few, their sums long
constexpr int kGainChunk = 128;              // channels whose moments are brought to shared memory together

struct Workspace {
  double* moments;  // [kMoments][k], stored channels
  double* gain;     // [kBitCounts]
  FirstBad* bad;
  std::int32_t* stored_at;  // [k] the stored channel of each input feature, or -1

  Workspace(void* memory, std::int64_t k)
      : moments(static_cast<double*>(memory)),
        gain(moments + kMoments * k),
        bad(reinterpret_cast<FirstBad*>(gain + kBitCounts)),
        stored_at(reinterpret_cast<std::int32_t*>(bad + 1)) {}
};

__global__ void invert_order_kernel(const std::int32_t* channel_order, std::int64_t k, Workspace work) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (c >= k) return;
  const std::int32_t j = channel_order[c];
  if (j < 0 || j >= k || atomicExch(&work.stored_at[j], static_cast<int>(c)) != -1) report_bad(work.bad, c);
}

__global__ void row_scale_kernel(const float* weight, std::int64_t n, std::int64_t k, float* row_scale, FirstBad* bad) {
  __shared__ float tile[kWarp][kWarp + 1];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kWarp, row = first + threadIdx.x;
  double sum = 0;
  for (std::int64_t column = 0; column < k; column += kWarp) {
    __syncwarp();
#pragma unroll 8
    for (int r = 0; r < kWarp; ++r) {
      const bool inside = first + r < n && column + threadIdx.x < k;
      tile[r][threadIdx.x] = inside ? weight[(first + r) * k + column + threadIdx.x] : 0.0f;
    }
    __syncwarp();
    const int count = static_cast<int>(k - column < kWarp ? k - column : kWarp);
    for (int i = 0; i < count; ++i) {
      const double w = static_cast<double>(tile[threadIdx.x][i]);
      sum += w * w;
    }
  }
  if (row >= n) return;
  const float scale = static_cast<float>(sqrt(sum / static_cast<double>(k)));
  if (!isfinite(scale)) report_bad(bad, row);
  row_scale[row] = scale;
}

__device__ std::uint8_t encode(float weight, float scale) {
  if (scale == 0.0f) return 128;
  const float code = floorf(weight / scale * 128.0f) + 128.0f;
  return static_cast<std::uint8_t>(fminf(fmaxf(code, 0.0f), 255.0f));
}

// One thread for each input feature.
__global__ void quantize_kernel(const QuantizeParams p, Workspace work) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (j >= p.k) return;
  const std::int64_t c = work.stored_at[j], blocks = block_count(p.n, p.block);
  const float* column = p.weight + j;
  double moment[kMoments] = {};
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * p.block, end = begin + p.block < p.n ? begin + p.block : p.n;
    float largest = 0;
#pragma unroll 8
    for (std::int64_t n = begin; n < end; ++n) {
      const float scale = p.row_scale[n], w = column[n * p.k];
      if (scale > 0.0f) largest = fmaxf(largest, fabsf(w) / scale);
    }
    const __half stored = __float2half_rn(largest);
    p.block_scale[c * blocks + b] = __half_as_ushort(stored);
#pragma unroll 4
    for (std::int64_t n = begin; n < end; ++n) {
      const float scale = p.row_scale[n] * __half2float(stored), weight = column[n * p.k];
      const std::uint8_t code = encode(weight, scale);
      p.codes[c * p.n + n] = code;
      const double w = static_cast<double>(weight);
      moment[0] += w * w;
#pragma unroll
      for (int bits = 1; bits < kBitCounts; ++bits) {
        const double value =
            static_cast<double>(scale * level(static_cast<unsigned>(code) >> (kCodeBits - bits), bits));
        moment[2 * bits - 1] += w * value;
        moment[2 * bits] += value * value;
      }
    }
  }
  for (int m = 0; m < kMoments; ++m) work.moments[m * p.k + c] = moment[m];
}

// One block: thread m sums moment m over the channels, in their order.
__global__ void gain_kernel(std::int64_t k, Workspace work, float* gain) {
  __shared__ double chunk[kMoments][kGainChunk + 1];
  __shared__ double sum[kMoments];
  double own = 0;
  for (std::int64_t first = 0; first < k; first += kGainChunk) {
    const int count = static_cast<int>(k - first < kGainChunk ? k - first : kGainChunk);
    __syncthreads();
    for (int m = 0; m < kMoments; ++m) {
      if (static_cast<int>(threadIdx.x) < count) chunk[m][threadIdx.x] = work.moments[m * k + first + threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x < kMoments) {
      for (int i = 0; i < count; ++i) own += chunk[threadIdx.x][i];
    }
  }
  if (threadIdx.x < kMoments) sum[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x >= kBitCounts) return;
  const int bits = static_cast<int>(threadIdx.x);
  const double product = bits ? sum[2 * bits - 1] : 0.0, level_square = bits ? sum[2 * bits] : 0.0;
  work.gain[bits] = level_square > 0.0 ? product / level_square : 0.0;
  gain[bits] = static_cast<float>(work.gain[bits]);
}

__global__ void error_kernel(std::int64_t n, std::int64_t k, Workspace work, float* channel_error) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int bits = static_cast<int>(blockIdx.y);
  if (c >= k) return;
  const double gain = work.gain[bits];
  const double product = bits ? work.moments[(2 * bits - 1) * k + c] : 0.0;
  const double level_square = bits ? work.moments[2 * bits * k + c] : 0.0;
  const double error = work.moments[c] - 2.0 * gain * product + gain * gain * level_square;
  channel_error[bits * k + c] = static_cast<float>((error > 0.0 ? error : 0.0) / static_cast<double>(n));
}

unsigned warps_for(std::int64_t count) { return static_cast<unsigned>((count + kWarp - 1) / kWarp); }

}  // namespace

std::int64_t quantize_workspace_bytes(std::int64_t k) {
  return (kMoments * k + kBitCounts) * 8 + static_cast<std::int64_t>(sizeof(FirstBad)) + 4 * k;
}

Status quantize(const QuantizeParams& params, void* workspace, cudaStream_t stream) {
  const std::int64_t n = params.n, k = params.k;
  if (n < 1 || k < 1) {
    return error("weight is [%lld, %lld]: it must be at least 1 x 1", static_cast<long long>(n),
                 static_cast<long long>(k));
  }
  const Workspace work(workspace, k);
  FirstBad bad = kNoneBad;
  clear_bad(work.bad, stream);
  cudaMemsetAsync(work.stored_at, 0xff, static_cast<std::size_t>(k) * 4, stream);
  invert_order_kernel<<<warps_for(k), kWarp, 0, stream>>>(params.channel_order, k, work);
  if (Status status = read_bad("quantize", work.bad, stream, &bad); !status.ok()) return status;
  if (bad != kNoneBad)
    return error("channel_order[%llu] is no new number of 0 to %lld: it must be a permutation", bad,
                 static_cast<long long>(k - 1));
  row_scale_kernel<<<warps_for(n), kWarp, 0, stream>>>(params.weight, n, k, params.row_scale, work.bad);
  if (Status status = read_bad("quantize", work.bad, stream, &bad); !status.ok()) return status;
  if (bad != kNoneBad) return error("weight has a NaN or infinite value in row %llu: allowed are finite values", bad);
  quantize_kernel<<<warps_for(k), kWarp, 0, stream>>>(params, work);
  gain_kernel<<<1, kGainChunk, 0, stream>>>(k, work, params.gain);
  error_kernel<<<dim3(warps_for(k), kBitCounts), kWarp, 0, stream>>>(n, k, work, params.channel_error);
  return launched("quantize");
}

}  // namespace grinqh::cuda
