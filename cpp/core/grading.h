// Grading of one row of x, shared by grade() and gemv().
#pragma once
#include <cstdint>
#include <span>

#include "grinqh/types.h"

namespace grinqh {

// x in stored-channel order as float32: values[c] = x[channel_order[c]].
void gather_row(const void* x_row, Dtype dtype, const PackedWeight& weight, std::span<float> values);

// The thresholds a row is graded with: those of `grading`, scaled to its budget if there is one.
struct RowThresholds {
  float value[kMaxPlanes];
};
RowThresholds row_thresholds(const PackedWeight& weight, const Grading& grading, std::span<const float> values);

// grades[c] for every stored channel: the number of thresholds that its importance is not below (a NaN is
// below none), at most its stored planes.
void grade_channels(const PackedWeight& weight, const Grading& grading, const RowThresholds& thresholds,
                    std::span<const float> values, std::span<std::uint8_t> grades);

}  // namespace grinqh
