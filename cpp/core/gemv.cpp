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

// How the work is cut, by the layer's size and sections alone: ranges of outputs, as wide as a kernel takes because
// long runs of each channel are what memory delivers fastest, and slices of channels, at least so many that there is
// work for a few threads. The sums of the slices are added in order.
struct Partition {
  static constexpr std::int64_t kSliceChannels = 1024;
  static constexpr std::int64_t kEnoughPieces = 4;
  struct OutputRange {
    int section;
    std::int64_t first;   // output that counts: a section may begin within a tile
    cpu::Range computed;  // from the beginning of that tile
  };
  std::int64_t k, slices, range_width, slice_width;
  std::vector<OutputRange> ranges;

  Partition(const Sections& sections, std::int64_t n, std::int64_t k_) : k(k_) {
    range_width = pieces(pieces(n, pieces(n, cpu::kMaxOutputs)), cpu::kTile) * cpu::kTile;
    for (int section = 0; section < sections.count; ++section) {
      const auto [first, end] = sections.outputs(section, n);
      for (std::int64_t begin = first / cpu::kTile * cpu::kTile; begin < end; begin += range_width) {
        ranges.push_back({section, std::max(first, begin), {begin, std::min(end, begin + range_width)}});
      }
    }
    const auto count = static_cast<std::int64_t>(ranges.size());
    slices = std::min(std::max(pieces(k, kSliceChannels), pieces(kEnoughPieces, count)), pieces(k, cpu::kTile));
    slice_width = pieces(k, slices);
    slices = pieces(k, slice_width);
  }
  // The slice that is worked on as the i-th: from both ends in turn, because threads take slices that follow each
  // other, and the first stored channels are read most.
  std::int64_t slice_at(std::int64_t i) const { return i % 2 == 0 ? i / 2 : slices - 1 - i / 2; }
  std::int64_t range_count() const { return static_cast<std::int64_t>(ranges.size()); }
  const OutputRange& range(std::int64_t i) const { return ranges[static_cast<std::size_t>(i)]; }
};

// What is known of a slice of a row, for one section of the outputs, before its weights are touched.
struct PreparedSlice {
  std::vector<float> values;  // x in stored order
  std::vector<std::uint8_t> grades;
  std::vector<std::int32_t> channel;
  std::vector<float> coefficient;
  cpu::GradedRow graded;
  std::vector<NonFinite> non_finite;
  std::int64_t bits = 0;  // read from all its channels together
};

// A coefficient this many times the mean magnitude of its grade is listed apart.
constexpr float kUnusual = 8.0f;

// Lists the slice's channels, of which stored channel `first` is the first, by grade.
void list_by_grade(const PackedWeight& weight, std::int64_t first, PreparedSlice& slice) {
  const std::size_t size = slice.values.size();
  // Four counters each, taken in turn: none waits for its own last addition.
  constexpr std::size_t kTurns = 4;
  std::int64_t graded[kMaxPlanes + 1][kTurns] = {};
  float magnitude[kMaxPlanes + 1][kTurns] = {};
  for (std::size_t c = 0; c < size; ++c) {
    ++graded[slice.grades[c]][c % kTurns];
    magnitude[slice.grades[c]][c % kTurns] += std::fabs(slice.values[c]);
  }
  float limit[kMaxPlanes + 1] = {};
  for (int g = 0; g <= weight.widths.count; ++g) {
    const std::int64_t count = graded[g][0] + graded[g][1] + graded[g][2] + graded[g][3];
    const float sum = magnitude[g][0] + magnitude[g][1] + magnitude[g][2] + magnitude[g][3];
    limit[g] = kUnusual * sum / static_cast<float>(std::max<std::int64_t>(count, 1));
  }
  const auto list_of = [&](std::size_t c) {
    return 2 * slice.grades[c] + (std::fabs(slice.values[c]) > limit[slice.grades[c]] ? 1 : 0);
  };

  constexpr int kLists = 2 * (kMaxPlanes + 1);  // lists 0 and 1, the skipped channels, go to the end
  std::int64_t listed[kLists][kTurns] = {};
  for (std::size_t c = 0; c < size; ++c) ++listed[list_of(c)][c % kTurns];
  std::int64_t next[kLists];
  for (int list = 0; list < kLists; ++list) {
    next[list] = listed[list][0] + listed[list][1] + listed[list][2] + listed[list][3];
  }
  slice.graded.segments = 0;
  std::int64_t end = 0;
  for (int list = 2; list < kLists; ++list) {
    const std::int64_t begin = end;
    end += next[list];
    next[list] = begin;
    if (end > begin) slice.graded.segment[slice.graded.segments++] = {begin, end, list / 2};
  }
  next[1] = end + next[0];
  next[0] = end;
  float gain[kMaxPlanes + 1] = {};
  std::copy(weight.gain, weight.gain + weight.widths.count, gain + 1);
  slice.channel.resize(size);
  slice.coefficient.resize(size);
  for (std::size_t c = 0; c < size; ++c) {
    const auto to = static_cast<std::size_t>(next[list_of(c)]++);
    slice.channel[to] = static_cast<std::int32_t>(first + static_cast<std::int64_t>(c));
    slice.coefficient[to] = slice.values[c] * gain[slice.grades[c]];
  }
  slice.graded.channel = slice.channel.data();
  slice.graded.coefficient = slice.coefficient.data();
}

void prepare_slice(const GemvParams& params, const void* x_row, const RowThresholds& thresholds, int section,
                   std::int64_t first, std::int64_t last, PreparedSlice& slice) {
  const PackedWeight& weight = params.weight;
  slice.values.resize(static_cast<std::size_t>(last - first));
  slice.grades.resize(slice.values.size());
  gather_row(x_row, params.dtype, weight, first, slice.values);
  grade_channels(weight, params.grading, thresholds, section, first, slice.values, slice.grades);
  slice.bits = 0;
  slice.non_finite.clear();
  for (std::size_t c = 0; c < slice.values.size(); ++c) {
    slice.bits += weight.widths.bits(slice.grades[c]);
    if (std::isfinite(slice.values[c])) continue;
    if (slice.grades[c] > 0) {
      slice.non_finite.push_back({first + static_cast<std::int64_t>(c), slice.grades[c], slice.values[c]});
    }
    slice.grades[c] = 0;
  }
  list_by_grade(weight, first, slice);
}

// What a matrix product gives for NaN and infinite inputs: each poisons or saturates the sums it enters.
void add_non_finite(const PackedWeight& weight, const cpu::Kernels& kernels, const PreparedSlice& slice,
                    cpu::Range outputs, float* sums) {
  if (slice.non_finite.empty()) return;
  std::vector<float> values(static_cast<std::size_t>(outputs.end - outputs.begin));
  for (const NonFinite& entry : slice.non_finite) {
    kernels.decode_channel(weight, entry.channel, entry.grade, outputs, values.data());
    for (std::size_t i = 0; i < values.size(); ++i) sums[i] += entry.x * values[i];
  }
}

// The rows that are worked on at once, with the memory for their slices and sums.
class RowBatch {
 public:
  RowBatch(const GemvParams& params, const Executor& executor)
      : params_(params),
        executor_(executor),
        kernels_(cpu::kernels_for(params.isa)),
        partition_(params.grading.sections, params.weight.n, params.weight.k) {
    const std::int64_t rows = std::min(params.m, kRowsAtOnce);
    prepared_.resize(static_cast<std::size_t>(sections() * rows * partition_.slices));
    sums_.resize(
        static_cast<std::size_t>(rows * partition_.slices * partition_.range_count() * partition_.range_width));
  }

  void multiply(std::int64_t first, std::int64_t count) {
    prepare(first, count);
    // Rows are innermost, so that they meet a piece of the weights in the cache.
    parallel_for(executor_, partition_.range_count() * partition_.slices, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t piece = begin; piece < end; ++piece) {
        const std::int64_t range = piece / partition_.slices;
        const std::int64_t slice = partition_.slice_at(piece % partition_.slices);
        const auto& [section, _, outputs] = partition_.range(range);
        for (std::int64_t r = 0; r < count; ++r) {
          float* sums = sums_of(r, slice, range);
          const PreparedSlice& prepared = slice_of(section, r, slice);
          kernels_.sum_channels(params_.weight, prepared.graded, outputs, sums);
          add_non_finite(params_.weight, kernels_, prepared, outputs, sums);
        }
      }
    });
    parallel_for(executor_, partition_.range_count() * count, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) finish(first, i % count, i / count);
    });
    if (params_.read_bits == nullptr) return;
    for (std::int64_t r = 0; r < count; ++r) params_.read_bits[first + r] = mean_read_bits(r);
  }

 private:
  void prepare(std::int64_t first, std::int64_t count) {
    std::vector<RowThresholds> thresholds(static_cast<std::size_t>(count));
    const auto x_row = [&](std::int64_t r) {
      const std::int64_t item = params_.dtype == Dtype::f32 ? 4 : 2;
      return static_cast<const char*>(params_.x) + (first + r) * params_.x_stride * item;
    };
    for (std::int64_t r = 0; r < count; ++r) {
      thresholds[static_cast<std::size_t>(r)] =
          row_thresholds(params_.weight, params_.grading, x_row(r), params_.dtype);
    }
    parallel_for(executor_, sections() * count * partition_.slices, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t r = i / partition_.slices % count, slice = i % partition_.slices;
        const auto section = static_cast<int>(i / partition_.slices / count);
        const std::int64_t from = slice * partition_.slice_width;
        const std::int64_t to = std::min(partition_.k, from + partition_.slice_width);
        prepare_slice(params_, x_row(r), thresholds[static_cast<std::size_t>(r)], section, from, to,
                      slice_of(section, r, slice));
      }
    });
  }

  // y of one row and range, from the sums of its slices.
  void finish(std::int64_t first, std::int64_t r, std::int64_t range) {
    const Partition::OutputRange& outputs = partition_.range(range);
    const std::int64_t skipped = outputs.first - outputs.computed.begin;
    const std::int64_t count = outputs.computed.end - outputs.computed.begin;
    const std::int64_t m = first + r;
    float* sums = sums_of(r, 0, range);
    for (std::int64_t s = 1; s < partition_.slices; ++s) {
      const float* slice = sums_of(r, s, range);
      for (std::int64_t i = skipped; i < count; ++i) sums[i] += slice[i];
    }
    for (std::int64_t i = skipped; i < count; ++i) {
      const std::int64_t n = outputs.computed.begin + i;
      float y = sums[i] * params_.weight.row_scale[n];
      if (params_.bias != nullptr) y += load_float(params_.bias, n, params_.dtype);
      store_float(params_.y, m * params_.weight.n + n, params_.dtype, y);
    }
  }

  float mean_read_bits(std::int64_t r) {
    std::int64_t bits = 0;
    for (int section = 0; section < sections(); ++section) {
      const auto [begin, end] = params_.grading.sections.outputs(section, params_.weight.n);
      for (std::int64_t s = 0; s < partition_.slices; ++s) bits += (end - begin) * slice_of(section, r, s).bits;
    }
    return static_cast<float>(static_cast<double>(bits) / static_cast<double>(params_.weight.n * partition_.k));
  }

  int sections() const { return params_.grading.sections.count; }
  PreparedSlice& slice_of(int section, std::int64_t r, std::int64_t slice) {
    const std::int64_t rows = std::min(params_.m, kRowsAtOnce);
    return prepared_[static_cast<std::size_t>((section * rows + r) * partition_.slices + slice)];
  }
  float* sums_of(std::int64_t r, std::int64_t slice, std::int64_t range) {
    return sums_.data() + ((r * partition_.slices + slice) * partition_.range_count() + range) * partition_.range_width;
  }

  const GemvParams& params_;
  const Executor& executor_;
  cpu::Kernels kernels_;
  Partition partition_;
  std::vector<PreparedSlice> prepared_;
  std::vector<float> sums_;
};

}  // namespace

Status gemv(const GemvParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_packed(weight);
  if (status.ok()) status = check_dtype(params.dtype);
  if (status.ok()) status = check_features(weight.channel_order, weight.k);
  if (status.ok()) status = check_grading(params.grading, weight.widths, weight.n);
  if (!status.ok()) return status;
  if (!isa_available(params.isa)) {
    return error("isa is %s: this machine does not run it", isa_name(params.isa));
  }

  RowBatch batch(params, executor);
  for (std::int64_t first = 0; first < params.m; first += kRowsAtOnce) {
    batch.multiply(first, std::min(kRowsAtOnce, params.m - first));
  }
  return {};
}

}  // namespace grinqh
