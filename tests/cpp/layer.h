// A random packed layer for tests, with what owns its memory, and the float64 reference of its product.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "core/half.h"
#include "grinqh/core.h"

namespace grinqh::testing {

inline std::vector<float> random_floats(std::size_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

struct Layer {
  std::int64_t n, k, block;
  PlaneWidths widths;
  std::vector<float> dense;  // the weights that were quantized, [n][k]
  std::vector<std::int32_t> order;
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> block_scale;
  std::vector<float> row_scale, gain, gain_by_bits, channel_error, channel_weight, thresholds;
  std::vector<std::int64_t> channels;
  std::vector<std::vector<std::uint8_t>> planes;

  PackedWeight packed() const {
    PackedWeight weight;
    weight.n = n;
    weight.k = k;
    weight.block = block;
    weight.widths = widths;
    for (int p = 0; p < widths.count; ++p) {
      weight.channels[p] = channels[static_cast<std::size_t>(p)];
      weight.plane[p] = planes[static_cast<std::size_t>(p)].data();
    }
    weight.block_scale = block_scale.data();
    weight.row_scale = row_scale.data();
    weight.gain = gain.data();
    weight.channel_order = order.data();
    return weight;
  }
  Grading grading() const { return {channel_weight.data(), thresholds.data(), nullptr, {}}; }
};

// `stored` is the part of the channels that the last plane is stored for, the others in between.
inline Layer random_layer(std::int64_t n, std::int64_t k, const PlaneWidths& widths, std::int64_t block = 64,
                          double stored = 1.0, unsigned seed = 1) {
  Layer layer{};
  layer.n = n;
  layer.k = k;
  layer.block = block;
  layer.widths = widths;
  const auto size = static_cast<std::size_t>(n * k);
  layer.dense = random_floats(size, seed);
  layer.order.resize(static_cast<std::size_t>(k));
  std::iota(layer.order.begin(), layer.order.end(), 0);
  std::shuffle(layer.order.begin(), layer.order.end(), std::mt19937(seed));
  layer.codes.resize(size);
  layer.block_scale.resize(static_cast<std::size_t>(k * block_count(n, block)));
  layer.row_scale.resize(static_cast<std::size_t>(n));
  layer.gain_by_bits.resize(kCodeBits + 1);
  layer.channel_error.resize(static_cast<std::size_t>((kCodeBits + 1) * k));
  QuantizeParams quantized{};
  quantized.weight = layer.dense.data();
  quantized.channel_order = layer.order.data();
  quantized.n = n;
  quantized.k = k;
  quantized.block = block;
  quantized.codes = layer.codes.data();
  quantized.block_scale = layer.block_scale.data();
  quantized.row_scale = layer.row_scale.data();
  quantized.gain = layer.gain_by_bits.data();
  quantized.channel_error = layer.channel_error.data();
  if (!quantize(quantized, {}).ok()) std::abort();

  PackParams packed{};
  packed.codes = layer.codes.data();
  packed.n = n;
  packed.k = k;
  packed.widths = widths;
  layer.planes.resize(static_cast<std::size_t>(widths.count));
  for (int p = 0; p < widths.count; ++p) {
    const double part = 1.0 - (1.0 - stored) * p / std::max(1, widths.count - 1);
    packed.channels[p] = static_cast<std::int64_t>(std::ceil(part * static_cast<double>(k)));
    auto& plane = layer.planes[static_cast<std::size_t>(p)];
    plane.resize(static_cast<std::size_t>(packed.channels[p] * plane_row_bytes(n, widths.width[p])));
    packed.plane[p] = plane.data();
    layer.channels.push_back(packed.channels[p]);
    layer.gain.push_back(layer.gain_by_bits[static_cast<std::size_t>(widths.bits(p + 1))]);
    layer.thresholds.push_back(0.25f * static_cast<float>(p + 1));
  }
  if (!pack(packed, {}).ok()) std::abort();
  std::mt19937 engine(seed + 1);
  std::uniform_real_distribution<float> weight(0.5f, 1.5f);
  for (std::int64_t c = 0; c < k; ++c) layer.channel_weight.push_back(weight(engine));
  return layer;
}

// The code of channel c and output n as far as the planes store it, from format.h and nothing else.
inline unsigned top_bits(const Layer& layer, std::int64_t c, std::int64_t n, int planes) {
  unsigned top = 0;
  for (int p = 0; p < planes; ++p) {
    const int width = layer.widths.width[p];
    const std::int64_t bit = n * width;
    const std::uint8_t byte = layer.planes[static_cast<std::size_t>(p)]
                                          [static_cast<std::size_t>(c * plane_row_bytes(layer.n, width) + bit / 8)];
    top = (top << width) | ((static_cast<unsigned>(byte) >> (bit % 8)) & ((1u << width) - 1u));
  }
  return top;
}

inline double weight_at(const Layer& layer, std::int64_t c, std::int64_t n, int grade) {
  if (grade == 0) return 0.0;
  const std::int64_t blocks = block_count(layer.n, layer.block);
  const double scale =
      static_cast<double>(layer.row_scale[static_cast<std::size_t>(n)]) *
      static_cast<double>(half_to_float(layer.block_scale[static_cast<std::size_t>(c * blocks + n / layer.block)]));
  const int bits = layer.widths.bits(grade);
  const double middle = (2.0 * top_bits(layer, c, n, grade) + 1.0) / std::pow(2.0, bits) - 1.0;
  return scale * static_cast<double>(layer.gain[static_cast<std::size_t>(grade - 1)]) * middle;
}

inline int grade_of(const Layer& layer, std::int64_t c, float x) {
  const float importance = std::fabs(x) * layer.channel_weight[static_cast<std::size_t>(c)];
  int grade = 0;
  for (std::size_t p = 0; p < layer.channels.size() && c < layer.channels[p]; ++p) {
    grade += importance >= layer.thresholds[p] ? 1 : 0;
  }
  return grade;
}

struct Reference {
  std::vector<double> y;
  std::vector<double> magnitude;  // sum of the terms' magnitudes: what rounding errors are measured against
};

inline Reference reference_product(const Layer& layer, const float* x) {
  Reference result{std::vector<double>(static_cast<std::size_t>(layer.n)),
                   std::vector<double>(static_cast<std::size_t>(layer.n))};
  for (std::int64_t c = 0; c < layer.k; ++c) {
    const float value = x[layer.order[static_cast<std::size_t>(c)]];
    const int grade = grade_of(layer, c, value);
    if (grade == 0) continue;
    for (std::int64_t n = 0; n < layer.n; ++n) {
      const double term = static_cast<double>(value) * weight_at(layer, c, n, grade);
      result.y[static_cast<std::size_t>(n)] += term;
      result.magnitude[static_cast<std::size_t>(n)] += std::fabs(term);
    }
  }
  return result;
}

}  // namespace grinqh::testing
