// Checks that the entries share. Each names the argument, its value and what is allowed.
#pragma once
#include "grinqh/types.h"

namespace grinqh {

Status check_shape(std::int64_t n, std::int64_t k);
Status check_block(std::int64_t block);
Status check_widths(const PlaneWidths& widths);
Status check_channels(const PlaneWidths& widths, const std::int64_t* channels, std::int64_t k);
Status check_dtype(Dtype dtype);
// Every value lies in [0, k): what keeps the kernels inside x, cheap enough for every call.
Status check_features(const std::int32_t* channel_order, std::int64_t k);
// And none occurs twice.
Status check_permutation(const std::int32_t* channel_order, std::int64_t k);
// As many sections as are supported, each with outputs, n together.
Status check_sections(const std::int64_t* sizes, std::int64_t count, std::int64_t n);
// Sections, and thresholds that never fall, none negative or NaN; channel weights are the caller's to check once.
Status check_grading(const Grading& grading, const PlaneWidths& widths, std::int64_t n);
Status check_packed(const PackedWeight& weight);

}  // namespace grinqh
