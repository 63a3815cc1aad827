// The CPU kernels: one function table for each instruction set.
#pragma once
#include <cstdint>

#include "grinqh/core.h"

namespace grinqh::cpu {

// Channels that are read alike, [begin, end) of a GradedRow's lists.
struct Segment {
  std::int64_t begin, end;
  int planes;
};

// One graded row of x, or a slice of it: the channels to read. Channels with a NaN or infinite x are not among
// them: gemv adds those in float, so that they give what a matrix product gives. Two segments for each grade keep
// unusually large coefficients apart, so that a kernel which rounds a group of channels to one fixed-point scale
// rounds the others finely.
struct GradedRow {
  const std::int32_t* channel;  // stored channels, in stored order within a segment
  const float* coefficient;     // x * gain of the grade
  Segment segment[2 * kMaxPlanes];
  int segments;
};

// Outputs a kernel is called for: [begin, end), at most kMaxOutputs, begin a multiple of kTile.
inline constexpr std::int64_t kTile = 128;
inline constexpr std::int64_t kMaxOutputs = 4096;

struct Range {
  std::int64_t begin, end;
};

// sums[i] = sum over the row's channels of coefficient * block_scale * level, for output begin + i
// (no row scale yet).
using SumChannels = void (*)(const PackedWeight& weight, const GradedRow& row, Range outputs, float* sums);

// values[i] = block_scale * level of stored channel c at `planes` planes, for output begin + i (no gain, no
// row scale). planes is at least 1 and stored for c.
using DecodeChannel = void (*)(const PackedWeight& weight, std::int64_t c, int planes, Range outputs, float* values);

// out[i] = values[i] * gain * row_scale[i], rounded to dtype.
using ScaleAndStore = void (*)(const float* values, const float* row_scale, float gain, std::int64_t count, Dtype dtype,
                               void* out);

struct Kernels {
  SumChannels sum_channels;
  DecodeChannel decode_channel;
  ScaleAndStore scale_and_store;
};

Kernels scalar_kernels();
#if defined(__x86_64__) || defined(_M_X64)
Kernels avx2_kernels();
Kernels avx512_kernels();
#elif defined(__aarch64__)
Kernels neon_kernels();
#endif

Kernels kernels_for(Isa isa);

}  // namespace grinqh::cpu
