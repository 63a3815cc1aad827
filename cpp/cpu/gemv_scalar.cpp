// The specification: every other kernel has to agree with this one within float32 accumulation error.
#include <algorithm>
#include <vector>

#include "../core/half.h"
#include "kernels.h"

namespace grinqh::cpu {
namespace {

void decode_channel(const PackedWeight& weight, std::int64_t c, int planes, Range outputs, float* values) {
  const std::uint16_t* scales = weight.block_scale + c * block_count(weight.n, weight.block);
  const int bits = weight.widths.bits(planes);
  for (std::int64_t n = outputs.begin; n < outputs.end; ++n) {
    unsigned top = 0;
    for (int p = 0; p < planes; ++p) {
      const int width = weight.widths.width[p];
      const std::uint8_t* row = weight.plane[p] + c * plane_row_bytes(weight.n, width);
      const std::int64_t bit = n * width;
      top = (top << width) | ((static_cast<unsigned>(row[bit / 8]) >> (bit % 8)) & ((1u << width) - 1u));
    }
    values[n - outputs.begin] = half_to_float(scales[n / weight.block]) * level(top, bits);
  }
}

void sum_channels(const PackedWeight& weight, const GradedRow& row, Range outputs, float* sums) {
  const std::int64_t count = outputs.end - outputs.begin;
  std::fill(sums, sums + count, 0.0f);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (int s = 0; s < row.segments; ++s) {
    const Segment& segment = row.segment[s];
    for (std::int64_t i = segment.begin; i < segment.end; ++i) {
      decode_channel(weight, row.channel[i], segment.planes, outputs, values.data());
      const float coefficient = row.coefficient[i];
      for (std::int64_t n = 0; n < count; ++n) sums[n] += coefficient * values[static_cast<std::size_t>(n)];
    }
  }
}

void scale_and_store(const float* values, const float* row_scale, float gain, std::int64_t count, Dtype dtype,
                     void* out) {
  for (std::int64_t i = 0; i < count; ++i) store_float(out, i, dtype, values[i] * gain * row_scale[i]);
}

}  // namespace

Kernels scalar_kernels() { return {sum_channels, decode_channel, scale_and_store}; }

}  // namespace grinqh::cpu
