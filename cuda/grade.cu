// Grades, read bits and budgets of rows: one block for each row of x.
#include "device.cuh"
#include "kernels.h"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = 512;

// A row's grading as the kernels here need it, by value in a kernel's parameters.
struct RowArgs {
  const void* x;
  std::int64_t x_stride;
  const std::int32_t* order;
  const float* channel_weight;
  const float* thresholds;
  const float* factor;
  std::int64_t channels[kMaxPlanes];
  int width[kMaxPlanes];
  int planes;
  Dtype dtype;
  std::int64_t k, m;
  int sections;
  std::int64_t outputs[kMaxSections];  // of each section
};

RowArgs row_args(const GradeParams& p) {
  RowArgs a{p.x,
            p.x_stride,
            p.weight.channel_order,
            p.grading.channel_weight,
            p.grading.thresholds,
            p.factor,
            {},
            {},
            p.weight.widths.count,
            p.dtype,
            p.weight.k,
            p.m,
            p.grading.sections.count,
            {}};
  for (int plane = 0; plane < a.planes; ++plane) {
    a.channels[plane] = p.weight.channels[plane];
    a.width[plane] = p.weight.widths.width[plane];
  }
  // Only proportions count, so a single section need not know its outputs.
  for (int s = 0; s < a.sections; ++s) a.outputs[s] = a.sections == 1 ? 1 : p.grading.sections.size[s];
  return a;
}

__device__ float importance(const RowArgs& a, std::int64_t row, std::int64_t c) {
  return fabsf(load_number(a.x, row * a.x_stride + a.order[c], a.dtype)) * a.channel_weight[c];
}

// Sum over the block, the same for every thread.
__device__ long long block_sum(long long value) {
  __shared__ long long parts[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  long long sum = 0;
  for (const long long part : parts) sum += part;
  return sum;
}

// The grade of stored channel c in a section.
__device__ int grade_of(const RowArgs& a, int section, std::int64_t c, float importance, float factor) {
  int grade = 0;
  for (int p = 0; p < a.planes && c < a.channels[p]; ++p) {
    grade += !(importance < scaled_threshold(a.thresholds[section * a.planes + p], factor));
  }
  return grade;
}

__device__ long long bits_read(const RowArgs& a, std::int64_t row, float factor) {
  long long bits = 0;
  for (std::int64_t c = threadIdx.x; c < a.k; c += kThreads) {
    const float value = importance(a, row, c);
    for (int s = 0; s < a.sections; ++s) {
      const int grade = grade_of(a, s, c, value, factor);
      for (int p = 0; p < grade; ++p) bits += a.width[p] * a.outputs[s];
    }
  }
  return block_sum(bits);
}

__device__ double weights_counted(const RowArgs& a) {
  long long outputs = 0;
  for (int s = 0; s < a.sections; ++s) outputs += a.outputs[s];
  return static_cast<double>(outputs * a.k);
}

__global__ void __launch_bounds__(kThreads) grade_kernel(RowArgs a, std::uint8_t* grades) {
  const std::int64_t row = blockIdx.x;
  const float factor = a.factor ? a.factor[row] : 1.0f;
  for (std::int64_t c = threadIdx.x; c < a.k; c += kThreads) {
    const float value = importance(a, row, c);
    for (int s = 0; s < a.sections; ++s) {
      grades[(s * a.m + row) * a.k + c] = static_cast<std::uint8_t>(grade_of(a, s, c, value, factor));
    }
  }
}

__global__ void __launch_bounds__(kThreads) read_bits_kernel(RowArgs a, float* read_bits) {
  const std::int64_t row = blockIdx.x;
  const long long bits = bits_read(a, row, a.factor ? a.factor[row] : 1.0f);
  if (threadIdx.x == 0) read_bits[row] = static_cast<float>(static_cast<double>(bits) / weights_counted(a));
}

// Positive floats are ordered as their bit patterns are, and the bits read never grow with the factor.
__global__ void __launch_bounds__(kThreads) fit_budget_kernel(RowArgs a, const float* budget, float* factor) {
  const std::int64_t row = blockIdx.x;
  const double allowed = static_cast<double>(*budget) * weights_counted(a);
  unsigned low = 0, high = 0x7f7fffffu;  // 0 and the largest finite float
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (static_cast<double>(bits_read(a, row, __uint_as_float(middle))) <= allowed) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (threadIdx.x == 0) factor[row] = __uint_as_float(low);
}

}  // namespace

Status grade(const GradeParams& params, cudaStream_t stream) {
  if (params.m == 0 || params.weight.k == 0) return {};
  const RowArgs args = row_args(params);
  const unsigned rows = static_cast<unsigned>(params.m);
  if (params.grades) grade_kernel<<<rows, kThreads, 0, stream>>>(args, params.grades);
  if (params.read_bits) read_bits_kernel<<<rows, kThreads, 0, stream>>>(args, params.read_bits);
  return launched("grade");
}

Status fit_budget(const GradeParams& params, float* factor, cudaStream_t stream) {
  if (params.m == 0 || params.weight.k == 0) return {};
  fit_budget_kernel<<<static_cast<unsigned>(params.m), kThreads, 0, stream>>>(row_args(params), params.grading.budget,
                                                                              factor);
  return launched("fit_budget");
}

}  // namespace grinqh::cuda
