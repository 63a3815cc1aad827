// The CPU kernels: one function table for each instruction set.
#pragma once
#include <cstdint>

#include "grinqh/core.h"

namespace grinqh::cpu {

// One graded row of x: the channels to read, by grade. Channels with a NaN or infinite x are not among
// them: gemv adds those in float, so that they give what a matrix product gives.
struct GradedRow {
  const std::int32_t* channel;  // stored channels, those of grade 1 first, each grade in stored order
  const float* coefficient;     // x * gain of the grade
  std::int64_t begin[kMaxPlanes + 2] = {};  // grade g is [begin[g], begin[g + 1]), g = 1..planes
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
