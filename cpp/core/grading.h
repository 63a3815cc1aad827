// Grading of one row of x, shared by grade() and gemv().
#pragma once
#include <cstdint>
#include <span>

#include "grinqh/types.h"

namespace grinqh {

// x of the stored channels from `first` on, as float32: values[i] = x[channel_order[first + i]].
void gather_row(const void* x_row, Dtype dtype, const PackedWeight& weight, std::int64_t first,
                std::span<float> values);

// The thresholds a row is graded with, by section: those of `grading`, scaled to its budget if there is one.
struct RowThresholds {
  float value[kMaxSections][kMaxPlanes];
};
RowThresholds row_thresholds(const PackedWeight& weight, const Grading& grading, const void* x_row, Dtype dtype);

// grades[i] of stored channel first + i for a section: the number of its thresholds that the channel's importance is
// not below (a NaN is below none), at most its stored planes.
void grade_channels(const PackedWeight& weight, const Grading& grading, const RowThresholds& thresholds, int section,
                    std::int64_t first, std::span<const float> values, std::span<std::uint8_t> grades);

}  // namespace grinqh
