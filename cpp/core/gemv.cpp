// y = W(grades of x) x on the CPU: grades each row, groups its channels by grade, and hands ranges of outputs
// to the kernel of the instruction set. Each output is summed by one thread in a fixed order, so results
// depend neither on the number of threads nor on the other rows.
#include <algorithm>
#include <cmath>
#include <span>
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

std::int64_t pieces(std::int64_t whole, std::int64_t piece) { return (whole + piece - 1) / piece; }

// How the work is cut, by the layer's size alone: ranges of outputs, as wide as a kernel takes because long runs of
// each channel are what memory delivers fastest, and slices of channels. Where that gives too few pieces for
// threads to share, ranges become narrower. The sums of the slices are added in order.
struct Partition {
  static constexpr std::int64_t kSliceChannels = 512;
  static constexpr std::int64_t kEnoughPieces = 8;
  std::int64_t n, k, ranges, slices, range_width, slice_width;

  Partition(std::int64_t n_, std::int64_t k_) : n(n_), k(k_) {
    slices = pieces(k, kSliceChannels);
    slice_width = pieces(k, slices);
    ranges = std::max(pieces(n, cpu::kMaxOutputs), pieces(kEnoughPieces, slices));
    range_width = pieces(pieces(n, ranges), cpu::kTile) * cpu::kTile;
    ranges = pieces(n, range_width);
  }
  cpu::Range outputs(std::int64_t range) const { return {range * range_width, std::min(n, (range + 1) * range_width)}; }
};

struct PreparedRow {
  std::vector<std::int32_t> channel;
  std::vector<float> coefficient;
  std::vector<cpu::GradedRow> slices;
  std::vector<NonFinite> non_finite;
  float read_bits = 0.0f;
};

// A coefficient this many times the mean magnitude of its grade is listed apart.
constexpr float kUnusual = 8.0f;

// Lists the channels of [first, last) by grade.
void group_slice(const PackedWeight& weight, std::span<const float> values, std::span<const std::uint8_t> grades,
                 std::int64_t first, std::int64_t last, PreparedRow& row, cpu::GradedRow& slice) {
  std::int64_t graded[kMaxPlanes + 1] = {};
  float magnitude[kMaxPlanes + 1] = {};
  for (std::int64_t c = first; c < last; ++c) {
    const auto at = static_cast<std::size_t>(c);
    ++graded[grades[at]];
    magnitude[grades[at]] += std::fabs(values[at]);
  }
  float limit[kMaxPlanes + 1] = {};
  for (int g = 0; g <= weight.widths.count; ++g) {
    limit[g] = kUnusual * magnitude[g] / static_cast<float>(std::max<std::int64_t>(graded[g], 1));
  }
  const auto list_of = [&](std::size_t c) { return 2 * grades[c] + (std::fabs(values[c]) > limit[grades[c]] ? 1 : 0); };

  constexpr int kLists = 2 * (kMaxPlanes + 1);  // lists 0 and 1, the skipped channels, go to the end
  std::int64_t next[kLists] = {};
  for (std::int64_t c = first; c < last; ++c) ++next[list_of(static_cast<std::size_t>(c))];
  slice.segments = 0;
  std::int64_t end = first;
  for (int list = 2; list < kLists; ++list) {
    const std::int64_t begin = end;
    end += next[list];
    next[list] = begin;
    if (end > begin) slice.segment[slice.segments++] = {begin, end, list / 2};
  }
  next[1] = end + next[0];
  next[0] = end;
  for (std::int64_t c = first; c < last; ++c) {
    const auto from = static_cast<std::size_t>(c);
    const int g = grades[from];
    const auto to = static_cast<std::size_t>(next[list_of(from)]++);
    row.channel[to] = static_cast<std::int32_t>(c);
    row.coefficient[to] = g == 0 ? 0.0f : values[from] * weight.gain[g - 1];
  }
  slice.channel = row.channel.data();
  slice.coefficient = row.coefficient.data();
}

void prepare_row(const GemvParams& params, const Partition& partition, std::int64_t m, PreparedRow& row) {
  const PackedWeight& weight = params.weight;
  const auto k = static_cast<std::size_t>(weight.k);
  const std::int64_t item = params.dtype == Dtype::f32 ? 4 : 2;
  std::vector<float> values(k);
  std::vector<std::uint8_t> grades(k);
  gather_row(static_cast<const char*>(params.x) + m * params.x_stride * item, params.dtype, weight, values);
  grade_channels(weight, params.grading, row_thresholds(weight, params.grading, values), values, grades);

  row.non_finite.clear();
  std::int64_t bits = 0;
  for (std::size_t c = 0; c < k; ++c) {
    bits += weight.widths.bits(grades[c]);
    if (std::isfinite(values[c])) continue;
    if (grades[c] > 0) row.non_finite.push_back({static_cast<std::int64_t>(c), grades[c], values[c]});
    grades[c] = 0;
  }
  row.read_bits = static_cast<float>(static_cast<double>(bits) / static_cast<double>(weight.k));
  row.channel.resize(k);
  row.coefficient.resize(k);
  row.slices.resize(static_cast<std::size_t>(partition.slices));
  for (std::size_t s = 0; s < row.slices.size(); ++s) {
    const std::int64_t first = static_cast<std::int64_t>(s) * partition.slice_width;
    group_slice(weight, values, grades, first, std::min(weight.k, first + partition.slice_width), row, row.slices[s]);
  }
}

// What a matrix product gives for NaN and infinite inputs: each poisons or saturates the sums it enters.
void add_non_finite(const PackedWeight& weight, const cpu::Kernels& kernels, const PreparedRow& row,
                    cpu::Range outputs, float* sums) {
  if (row.non_finite.empty()) return;
  std::vector<float> values(static_cast<std::size_t>(outputs.end - outputs.begin));
  for (const NonFinite& entry : row.non_finite) {
    kernels.decode_channel(weight, entry.channel, entry.grade, outputs, values.data());
    for (std::size_t i = 0; i < values.size(); ++i) sums[i] += entry.x * values[i];
  }
}

// y of one row and range from the sums of its slices, `stride` apart.
void finish_range(const GemvParams& params, const cpu::Kernels& kernels, const PreparedRow& row, std::int64_t m,
                  cpu::Range outputs, float* sums, std::int64_t stride) {
  const std::int64_t count = outputs.end - outputs.begin;
  for (std::size_t s = 1; s < row.slices.size(); ++s) {
    const float* slice = sums + static_cast<std::int64_t>(s) * stride;
    for (std::int64_t i = 0; i < count; ++i) sums[i] += slice[i];
  }
  add_non_finite(params.weight, kernels, row, outputs, sums);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t n = outputs.begin + i;
    float y = sums[i] * params.weight.row_scale[n];
    if (params.bias != nullptr) y += load_float(params.bias, n, params.dtype);
    store_float(params.y, m * params.weight.n + n, params.dtype, y);
  }
}

}  // namespace

Status gemv(const GemvParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_packed(weight);
  if (status.ok()) status = check_dtype(params.dtype);
  if (status.ok()) status = check_features(weight.channel_order, weight.k);
  if (status.ok()) status = check_grading(params.grading, weight.widths);
  if (!status.ok()) return status;
  if (!isa_available(params.isa)) {
    return error("isa is %s: this machine does not run it", isa_name(params.isa));
  }

  const cpu::Kernels kernels = cpu::kernels_for(params.isa);
  const Partition partition(weight.n, weight.k);
  const std::int64_t ranges = partition.ranges;
  const std::int64_t slices = partition.slices;
  const std::int64_t width = partition.range_width;
  const std::int64_t rows_at_once = std::min(params.m, kRowsAtOnce);
  std::vector<PreparedRow> rows(static_cast<std::size_t>(rows_at_once));
  std::vector<float> sums(static_cast<std::size_t>(rows_at_once * slices * ranges * width));
  const auto sums_of = [&](std::int64_t r, std::int64_t slice, std::int64_t range) {
    return sums.data() + ((r * slices + slice) * ranges + range) * width;
  };
  for (std::int64_t first = 0; first < params.m; first += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, params.m - first);
    parallel_for(executor, count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        PreparedRow& row = rows[static_cast<std::size_t>(r)];
        prepare_row(params, partition, first + r, row);
        if (params.read_bits != nullptr) params.read_bits[first + r] = row.read_bits;
      }
    });
    // Rows are innermost, so that they meet a piece of the weights in the cache.
    parallel_for(executor, ranges * slices, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t piece = begin; piece < end; ++piece) {
        const std::int64_t slice = piece % slices;
        const std::int64_t range = piece / slices;
        for (std::int64_t r = 0; r < count; ++r) {
          kernels.sum_channels(weight, rows[static_cast<std::size_t>(r)].slices[static_cast<std::size_t>(slice)],
                               partition.outputs(range), sums_of(r, slice, range));
        }
      }
    });
    parallel_for(executor, ranges * count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t r = i % count;
        const std::int64_t range = i / count;
        finish_range(params, kernels, rows[static_cast<std::size_t>(r)], first + r, partition.outputs(range),
                     sums_of(r, 0, range), ranges * width);
      }
    });
  }
  return {};
}

}  // namespace grinqh
