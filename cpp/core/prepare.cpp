// The RMS norm or gated SiLU before a layer. This is the specification of the CUDA kernels' too.
#include <array>
#include <cmath>

#include "grinqh/core.h"
#include "half.h"
#include "parallel.h"

namespace grinqh {
namespace {

float rounded(float value, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return half_to_float(float_to_half(value));
    case Dtype::bf16: return bfloat16_to_float(float_to_bfloat16(value));
    case Dtype::f32: break;
  }
  return value;
}

float silu(float value) { return value / (1.0f + std::exp(-value)); }

float mean_square(const void* x, std::int64_t first, std::int64_t k, Dtype dtype) {
  std::array<float, kNormLanes> lane{};
  for (std::int64_t j = 0; j < k; ++j) {
    const float value = load_float(x, first + j, dtype);
    lane[static_cast<std::size_t>(j % kNormLanes)] += value * value;
  }
  float sum = 0.0f;
  for (std::size_t group = 0; group < kNormLanes; group += 32) {
    for (std::size_t apart = 16; apart > 0; apart /= 2) {
      for (std::size_t i = 0; i < apart; ++i) lane[group + i] += lane[group + i + apart];
    }
    sum += lane[group];
  }
  return sum / static_cast<float>(k);
}

void prepare_row(const PrepareParams& p, std::int64_t row) {
  const std::int64_t first = row * p.x_stride, to = row * p.k;
  if (p.transform.gated) {
    for (std::int64_t j = 0; j < p.k; ++j) {
      const float gate = rounded(silu(load_float(p.x, first + j, p.dtype)), p.dtype);
      store_float(p.out, to + j, p.dtype, gate * load_float(p.x, first + p.k + j, p.dtype));
    }
    return;
  }
  const float square = mean_square(p.x, first, p.k, p.dtype) + p.transform.norm_eps;
  const auto factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(square)));
  for (std::int64_t j = 0; j < p.k; ++j) {
    const float value = rounded(load_float(p.x, first + j, p.dtype) * factor, p.dtype);
    store_float(p.out, to + j, p.dtype, value * load_float(p.transform.norm_weight, j, p.dtype));
  }
}

}  // namespace

Status prepare(const PrepareParams& params, const Executor& executor) {
  if (params.transform.nothing()) return error("neither a norm nor a gate is given: one of them must be");
  if (Status status = check_transform(params.transform); !status.ok()) return status;
  parallel_for(executor, params.m, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) prepare_row(params, row);
  });
  return {};
}

}  // namespace grinqh
