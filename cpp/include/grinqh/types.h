// What every entry of the core shares: errors as values, number types, the view of a packed layer.
#pragma once
#include <cstdint>
#include <cstdio>

#include "grinqh/format.h"

namespace grinqh {

// An error is a text that names the argument, its value and what is allowed; no text means success.
struct Status {
  char message[256] = {};
  bool ok() const { return message[0] == '\0'; }
};

template <typename... Args>
Status error(const char* format, Args... args) {
  Status status;
  std::snprintf(status.message, sizeof(status.message), format, args...);
  return status;
}

enum class Dtype : std::int32_t { f32, f16, bf16 };

// A packed layer as the canonical format lays it out (format.h). All pointers are borrowed.
struct PackedWeight {
  std::int64_t n = 0;      // out_features
  std::int64_t k = 0;      // in_features
  std::int64_t block = 0;  // outputs that share a block scale
  PlaneWidths widths;
  std::int64_t channels[kMaxPlanes] = {};       // stored channels of each plane, never growing
  const std::uint8_t* plane[kMaxPlanes] = {};   // [channels[p]][plane_row_bytes(n, width[p])]
  const std::uint16_t* block_scale = nullptr;   // float16 [k][block_count(n, block)]
  const float* row_scale = nullptr;             // [n]
  const float* gain = nullptr;                  // [planes]
  const std::int32_t* channel_order = nullptr;  // [k], the input feature of each stored channel
};

// Outputs that are graded by thresholds of their own: layers that were put together (q, k and v) are a section each.
inline constexpr int kMaxSections = 4;
struct Sections {
  int count = 1;
  std::int64_t size[kMaxSections] = {};  // outputs of each, one section after the other; 0 stands for all if it is one

  struct Range {
    std::int64_t begin, end;
  };
  Range outputs(int section, std::int64_t n) const {
    if (count == 1) return {0, n};
    std::int64_t begin = 0;
    for (int s = 0; s < section; ++s) begin += size[s];
    return {begin, begin + size[section]};
  }
  bool operator==(const Sections&) const = default;
};

// How a token's channels are graded: stored channel c of input row x has the importance
// |x[channel_order[c]]| * channel_weight[c], and its grade for a section of the outputs is the number of the section's
// thresholds at or below it, at most the number of planes stored for it. With a budget, each row's thresholds are first
// scaled by one factor, found for the row, so that the row reads as many bits as the budget allows and no more.
struct Grading {
  const float* channel_weight = nullptr;  // [k], finite and >= 0
  const float* thresholds = nullptr;      // [sections][planes], >= 0, never falling in a section, infinity allowed
  const float* budget = nullptr;          // [1] or null: mean read bits per weight allowed for each row
  Sections sections;
};

// What a layer does to its input itself, in place of the module before it: nothing, an RMS norm or a gated SiLU.
// Sums of squares run in an order that does not depend on the machine: element j goes to lane j % kNormLanes, in
// turn; the lanes of each 32 meet pairwise, 16, 8, 4, 2 and 1 apart; those sums are added from the first to the last.
inline constexpr int kNormLanes = 512;
struct InputTransform {
  const void* norm_weight = nullptr;  // [k], of x's dtype: x * (mean of x^2 + norm_eps)^-1/2, then times the weight
  float norm_eps = 0;
  bool gated = false;  // a row of x has 2k values g and u: silu(g) * u
  bool nothing() const { return norm_weight == nullptr && !gated; }
};  // every product and the SiLU are rounded to x's dtype

inline Status check_transform(const InputTransform& transform) {
  if (transform.norm_weight != nullptr && transform.gated) {
    return error("a norm and a gate are given: only one of them is allowed");
  }
  if (!(transform.norm_eps >= 0.0f)) {
    return error("norm_eps is %g: it must be at least 0", static_cast<double>(transform.norm_eps));
  }
  return {};
}

}  // namespace grinqh
