// y = W(grades of x) x on the CPU: grades each row, groups its channels by grade, and hands ranges of outputs
// to the kernel of the instruction set. Each output is summed by one thread in a fixed order, so results
// depend neither on the number of threads nor on the other rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu/kernels.h"
#include "grading.h"
#include "grinqh/core.h"
#include "half.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

constexpr std::int64_t kRowsAtOnce = 16;  // whose graded lists are kept while a range of weights is in the cache

struct NonFinite {
  std::int64_t channel;
  int grade;
  float x;
};

struct PreparedRow {
  std::vector<std::int32_t> channel;
  std::vector<float> coefficient;
  cpu::GradedRow graded;
  std::vector<NonFinite> non_finite;
  float read_bits = 0.0f;
};

void prepare_row(const GemvParams& params, std::int64_t m, PreparedRow& row) {
  const PackedWeight& weight = params.weight;
  const auto k = static_cast<std::size_t>(weight.k);
  const std::int64_t item = params.dtype == Dtype::f32 ? 4 : 2;
  std::vector<float> values(k);
  std::vector<std::uint8_t> grades(k);
  gather_row(static_cast<const char*>(params.x) + m * params.x_stride * item, params.dtype, weight, values);
  grade_channels(weight, params.grading, row_thresholds(weight, params.grading, values), values, grades);

  std::int64_t count[kMaxPlanes + 1] = {};
  for (std::size_t c = 0; c < k; ++c) ++count[grades[c]];
  std::int64_t bits = 0;
  for (int g = 1; g <= weight.widths.count; ++g) bits += count[g] * weight.widths.bits(g);
  row.read_bits = static_cast<float>(static_cast<double>(bits) / static_cast<double>(weight.k));

  row.non_finite.clear();
  for (std::size_t c = 0; c < k; ++c) {
    if (std::isfinite(values[c])) continue;
    if (grades[c] > 0) row.non_finite.push_back({static_cast<std::int64_t>(c), grades[c], values[c]});
    --count[grades[c]];
    grades[c] = 0;
  }

  std::int64_t next[kMaxPlanes + 1] = {};
  std::int64_t end = 0;
  for (int g = 1; g <= weight.widths.count; ++g) {
    row.graded.begin[g] = next[g] = end;
    end += count[g];
  }
  row.graded.begin[weight.widths.count + 1] = end;
  row.channel.resize(static_cast<std::size_t>(end));
  row.coefficient.resize(static_cast<std::size_t>(end));
  for (std::size_t c = 0; c < k; ++c) {
    const int g = grades[c];
    if (g == 0) continue;
    const auto at = static_cast<std::size_t>(next[g]++);
    row.channel[at] = static_cast<std::int32_t>(c);
    row.coefficient[at] = values[c] * weight.gain[g - 1];
  }
  row.graded.channel = row.channel.data();
  row.graded.coefficient = row.coefficient.data();
}

// What a matrix product gives for NaN and infinite inputs: each poisons or saturates the sums it enters.
void add_non_finite(const GemvParams& params, const cpu::Kernels& kernels, const PreparedRow& row, cpu::Range outputs,
                    float* sums) {
  std::vector<float> values(static_cast<std::size_t>(outputs.end - outputs.begin));
  for (const NonFinite& entry : row.non_finite) {
    kernels.decode_channel(params.weight, entry.channel, entry.grade, outputs, values.data());
    for (std::size_t i = 0; i < values.size(); ++i) sums[i] += entry.x * values[i];
  }
}

// Outputs one call of a kernel covers. A function of n alone: enough ranges to share among threads, wide
// enough that a plane's run in a range is a cache line or more.
std::int64_t range_width(std::int64_t n) {
  return std::clamp<std::int64_t>(n / 8 / cpu::kTile * cpu::kTile, cpu::kTile, 4 * cpu::kTile);
}

}  // namespace

Status gemv(const GemvParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_packed(weight);
  if (status.ok()) status = check_dtype(params.dtype);
  if (status.ok()) status = check_grading(params.grading, weight.widths);
  if (!status.ok()) return status;

  const cpu::Kernels kernels = cpu::kernels_for(params.isa);
  const std::int64_t width = range_width(weight.n);
  const std::int64_t ranges = (weight.n + width - 1) / width;
  std::vector<PreparedRow> rows(static_cast<std::size_t>(std::min(params.m, kRowsAtOnce)));
  for (std::int64_t first = 0; first < params.m; first += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, params.m - first);
    parallel_for(executor, count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        prepare_row(params, first + r, rows[static_cast<std::size_t>(r)]);
        if (params.read_bits != nullptr) params.read_bits[first + r] = rows[static_cast<std::size_t>(r)].read_bits;
      }
    });
    parallel_for(executor, ranges, 1, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> sums(static_cast<std::size_t>(width));
      for (std::int64_t range = begin; range < end; ++range) {
        const cpu::Range outputs{range * width, std::min(weight.n, (range + 1) * width)};
        for (std::int64_t r = 0; r < count; ++r) {
          const PreparedRow& row = rows[static_cast<std::size_t>(r)];
          kernels.sum_channels(weight, row.graded, outputs, sums.data());
          add_non_finite(params, kernels, row, outputs, sums.data());
          for (std::int64_t n = outputs.begin; n < outputs.end; ++n) {
            float y = sums[static_cast<std::size_t>(n - outputs.begin)] * weight.row_scale[n];
            if (params.bias != nullptr) y += load_float(params.bias, n, params.dtype);
            store_float(params.y, (first + r) * weight.n + n, params.dtype, y);
          }
        }
      }
    });
  }
  return {};
}

}  // namespace grinqh
