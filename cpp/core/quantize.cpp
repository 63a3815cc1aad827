// Weights to codes. The scale of a weight is row_scale[n] * block_scale[c][n / block]: the root mean square
// of its row times the largest magnitude of its block in the row-normalised matrix (no clipping).
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "grinqh/core.h"
#include "half.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

constexpr int kBitCounts = kCodeBits + 1;  // 0..8 bits

Status row_scales(const QuantizeParams& params, const Executor& executor) {
  parallel_for(executor, params.n, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < params.k; ++j) {
        const double w = static_cast<double>(params.weight[n * params.k + j]);
        sum += w * w;
      }
      params.row_scale[n] = static_cast<float>(std::sqrt(sum / static_cast<double>(params.k)));
    }
  });
  for (std::int64_t n = 0; n < params.n; ++n) {
    if (!std::isfinite(params.row_scale[n])) {
      return error("weight has a NaN or infinite value in row %lld: allowed are finite values",
                   static_cast<long long>(n));
    }
  }
  return {};
}

// What is needed to know a channel's error at each number of bits for any gain.
struct ChannelMoments {
  double weight_square = 0.0;                     // sum of w^2
  std::array<double, kBitCounts> product{};       // sum of w * w_b at gain 1
  std::array<double, kBitCounts> level_square{};  // sum of w_b^2 at gain 1
};

std::uint8_t encode(float weight, float scale) {
  if (scale == 0.0f) return 128;
  const float code = std::floor(weight / scale * 128.0f) + 128.0f;
  return static_cast<std::uint8_t>(std::clamp(code, 0.0f, 255.0f));
}

void add_moments(ChannelMoments& moments, float weight, float scale, std::uint8_t code) {
  const double w = static_cast<double>(weight);
  moments.weight_square += w * w;
  for (int b = 1; b < kBitCounts; ++b) {
    const double value = static_cast<double>(scale * level(static_cast<unsigned>(code) >> (kCodeBits - b), b));
    moments.product[static_cast<std::size_t>(b)] += w * value;
    moments.level_square[static_cast<std::size_t>(b)] += value * value;
  }
}

ChannelMoments quantize_channel(const QuantizeParams& params, std::int64_t c, const float* column) {
  const std::int64_t blocks = block_count(params.n, params.block);
  ChannelMoments moments;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t begin = b * params.block;
    const std::int64_t end = std::min(params.n, begin + params.block);
    float largest = 0.0f;
    for (std::int64_t n = begin; n < end; ++n) {
      if (params.row_scale[n] > 0.0f) largest = std::max(largest, std::fabs(column[n]) / params.row_scale[n]);
    }
    const std::uint16_t stored = float_to_half(largest);
    params.block_scale[c * blocks + b] = stored;
    for (std::int64_t n = begin; n < end; ++n) {
      const float scale = params.row_scale[n] * half_to_float(stored);
      const std::uint8_t code = encode(column[n], scale);
      params.codes[c * params.n + n] = code;
      add_moments(moments, column[n], scale, code);
    }
  }
  return moments;
}

void gains_and_errors(const QuantizeParams& params, const std::vector<ChannelMoments>& moments) {
  for (std::size_t b = 0; b < kBitCounts; ++b) {
    double product = 0.0;
    double level_square = 0.0;
    for (const ChannelMoments& m : moments) {
      product += m.product[b];
      level_square += m.level_square[b];
    }
    const double gain = level_square > 0.0 ? product / level_square : 0.0;
    params.gain[b] = static_cast<float>(gain);
    for (std::int64_t c = 0; c < params.k; ++c) {
      const ChannelMoments& m = moments[static_cast<std::size_t>(c)];
      const double error = m.weight_square - 2.0 * gain * m.product[b] + gain * gain * m.level_square[b];
      params.channel_error[static_cast<std::int64_t>(b) * params.k + c] =
          static_cast<float>(std::max(error, 0.0) / static_cast<double>(params.n));
    }
  }
}

}  // namespace

Status quantize(const QuantizeParams& params, const Executor& executor) {
  if (Status status = check_shape(params.n, params.k); !status.ok()) return status;
  if (Status status = check_block(params.block); !status.ok()) return status;
  if (Status status = check_permutation(params.channel_order, params.k); !status.ok()) return status;
  if (Status status = row_scales(params, executor); !status.ok()) return status;

  std::vector<ChannelMoments> moments(static_cast<std::size_t>(params.k));
  constexpr std::int64_t kStrip = 16;  // columns gathered at a time: a cache line of each row
  // Strips follow the input's column order, so that the gather reads each line of the weight once.
  std::vector<std::int32_t> stored_at(static_cast<std::size_t>(params.k));
  for (std::int64_t c = 0; c < params.k; ++c) {
    stored_at[static_cast<std::size_t>(params.channel_order[c])] = static_cast<std::int32_t>(c);
  }
  parallel_for(executor, (params.k + kStrip - 1) / kStrip, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> columns(static_cast<std::size_t>(kStrip * params.n));
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t first = strip * kStrip;
      const std::int64_t count = std::min(kStrip, params.k - first);
      for (std::int64_t n = 0; n < params.n; ++n) {
        for (std::int64_t i = 0; i < count; ++i) {
          columns[static_cast<std::size_t>(i * params.n + n)] = params.weight[n * params.k + first + i];
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t c = stored_at[static_cast<std::size_t>(first + i)];
        moments[static_cast<std::size_t>(c)] = quantize_channel(params, c, columns.data() + i * params.n);
      }
    }
  });
  gains_and_errors(params, moments);
  return {};
}

}  // namespace grinqh
