#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "grading.h"
#include "grinqh/core.h"
#include "half.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

// An infinite threshold stays so for every factor, 0 included.
RowThresholds scaled(const Grading& grading, int planes, float factor) {
  RowThresholds result{};
  for (int s = 0; s < grading.sections.count; ++s) {
    for (int p = 0; p < planes; ++p) {
      const float threshold = grading.thresholds[s * planes + p];
      result.value[s][p] = std::isinf(threshold) ? threshold : factor * threshold;
    }
  }
  return result;
}

// Of all weights together.
std::int64_t bits_read(const PackedWeight& weight, const Sections& sections, const RowThresholds& thresholds,
                       std::span<const float> importance) {
  std::int64_t sum = 0;
  for (int s = 0; s < sections.count; ++s) {
    const auto [begin, end] = sections.outputs(s, weight.n);
    for (int p = 0; p < weight.widths.count; ++p) {
      std::int64_t count = 0;
      for (std::int64_t c = 0; c < weight.channels[p]; ++c) {
        count += !(importance[static_cast<std::size_t>(c)] < thresholds.value[s][p]);
      }
      sum += count * weight.widths.width[p] * (end - begin);
    }
  }
  return sum;
}

// The smallest factor whose thresholds read no more than the budget: bits_read never grows with the factor,
// and positive floats are ordered as their bit patterns are, so a bisection of the patterns finds it.
RowThresholds within_budget(const PackedWeight& weight, const Grading& grading, std::span<const float> importance) {
  // Only the proportions of the sections count; a single one has all outputs, however many.
  PackedWeight counted = weight;
  if (grading.sections.count == 1) counted.n = 1;
  const double allowed = static_cast<double>(*grading.budget) * static_cast<double>(counted.n * counted.k);
  const auto fits = [&](std::uint32_t pattern) {
    const RowThresholds tried = scaled(grading, weight.widths.count, std::bit_cast<float>(pattern));
    return static_cast<double>(bits_read(counted, grading.sections, tried, importance)) <= allowed;
  };
  std::uint32_t low = 0;  // the pattern of 0.0f
  std::uint32_t high = std::bit_cast<std::uint32_t>(std::numeric_limits<float>::max());
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2;
    if (fits(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return scaled(grading, weight.widths.count, std::bit_cast<float>(low));
}

}  // namespace

void gather_row(const void* x_row, Dtype dtype, const PackedWeight& weight, std::int64_t first,
                std::span<float> values) {
  const std::int32_t* feature = weight.channel_order + first;
  const auto gather = [&](auto load) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = load(feature[i]);
  };
  switch (dtype) {
    case Dtype::f32: gather([x = static_cast<const float*>(x_row)](std::int32_t j) { return x[j]; }); return;
    case Dtype::f16:
      gather([x = static_cast<const std::uint16_t*>(x_row)](std::int32_t j) { return half_to_float(x[j]); });
      return;
    case Dtype::bf16:
      gather([x = static_cast<const std::uint16_t*>(x_row)](std::int32_t j) { return bfloat16_to_float(x[j]); });
      return;
  }
}

RowThresholds row_thresholds(const PackedWeight& weight, const Grading& grading, const void* x_row, Dtype dtype) {
  if (grading.budget == nullptr) return scaled(grading, weight.widths.count, 1.0f);
  std::vector<float> importance(static_cast<std::size_t>(weight.k));
  gather_row(x_row, dtype, weight, 0, importance);
  for (std::size_t c = 0; c < importance.size(); ++c) {
    importance[c] = std::fabs(importance[c]) * grading.channel_weight[c];
  }
  return within_budget(weight, grading, importance);
}

void grade_channels(const PackedWeight& weight, const Grading& grading, const RowThresholds& thresholds, int section,
                    std::int64_t first, std::span<const float> values, std::span<std::uint8_t> grades) {
  const float* channel_weight = grading.channel_weight + first;
  const auto count = static_cast<std::int64_t>(values.size());
  for (std::int64_t i = 0; i < count; ++i) grades[static_cast<std::size_t>(i)] = 0;
  for (int p = 0; p < weight.widths.count; ++p) {
    const float threshold = thresholds.value[section][p];
    const std::int64_t stored = std::clamp<std::int64_t>(weight.channels[p] - first, 0, count);
    for (std::int64_t i = 0; i < stored; ++i) {
      const auto c = static_cast<std::size_t>(i);
      const float importance = std::fabs(values[c]) * channel_weight[i];
      grades[c] = static_cast<std::uint8_t>(grades[c] + (importance < threshold ? 0 : 1));
    }
  }
}

Status grade(const GradeParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_shape(weight.n, weight.k);
  if (status.ok()) status = check_widths(weight.widths);
  if (status.ok()) status = check_channels(weight.widths, weight.channels, weight.k);
  if (status.ok()) status = check_dtype(params.dtype);
  if (status.ok()) status = check_features(weight.channel_order, weight.k);
  if (status.ok()) status = check_grading(params.grading, weight.widths, weight.n);
  if (!status.ok()) return status;

  const auto k = static_cast<std::size_t>(weight.k);
  const std::int64_t item = params.dtype == Dtype::f32 ? 4 : 2;
  parallel_for(executor, params.m, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> values(k);
    for (std::int64_t m = begin; m < end; ++m) {
      const char* x_row = static_cast<const char*>(params.x) + m * params.x_stride * item;
      gather_row(x_row, params.dtype, weight, 0, values);
      const RowThresholds thresholds = row_thresholds(weight, params.grading, x_row, params.dtype);
      for (int s = 0; s < params.grading.sections.count; ++s) {
        std::uint8_t* grades = params.grades + (s * params.m + m) * weight.k;
        grade_channels(weight, params.grading, thresholds, s, 0, values, {grades, k});
      }
    }
  });
  return {};
}

}  // namespace grinqh
