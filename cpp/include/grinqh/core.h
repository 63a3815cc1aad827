// The core's entries: plain structs in, a Status out. No torch, no Python, no exceptions.
#pragma once
#include <cstdint>

#include "grinqh/types.h"

namespace grinqh {

// How work is shared among threads. `run` calls body(begin, end, context) over pieces that cover
// [0, count), each a multiple of `grain` long but the last. Null: everything on the calling thread.
struct Executor {
  using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
  void (*run)(std::int64_t count, std::int64_t grain, Body body, void* context) = nullptr;
};

// The instruction sets the kernels are written for. `scalar` is the specification.
enum class Isa : std::int32_t { scalar, avx2, avx512, neon };
const char* isa_name(Isa isa);
// The best that this machine runs, or the one that the environment variable GRINQH_CPU_ISA names. An error where it
// names none that this machine runs.
Status current_isa(Isa& isa);
bool isa_available(Isa isa);

// Orders channels by falling importance mean_square[j] * energy of column j, ties by index.
struct SortParams {
  const float* weight;       // [n][k], row-major
  const float* mean_square;  // [k] mean of x_j^2 over a calibration set, or null for all ones
  std::int64_t n, k;
  std::int32_t* channel_order;  // out [k]
};
Status sort_channels(const SortParams& params, const Executor& executor);

// Quantizes a layer to 8-bit codes, and measures what every number of bits b = 0..8 would lose.
struct QuantizeParams {
  const float* weight;                // [n][k], row-major
  const std::int32_t* channel_order;  // [k], a permutation
  std::int64_t n, k, block;
  std::uint8_t* codes;         // out [k][n], stored channels
  std::uint16_t* block_scale;  // out float16 [k][block_count(n, block)]
  float* row_scale;            // out [n]
  float* gain;                 // out [9] least-squares gain of the top b bits (0 for b = 0)
  float* channel_error;        // out [9][k] mean squared weight error of each stored channel at b bits
};
Status quantize(const QuantizeParams& params, const Executor& executor);

struct PackParams {
  const std::uint8_t* codes;  // [k][n]
  std::int64_t n, k;
  PlaneWidths widths;
  std::int64_t channels[kMaxPlanes];  // stored channels of each plane
  std::uint8_t* plane[kMaxPlanes];    // out
};
Status pack(const PackParams& params, const Executor& executor);

struct UnpackParams {
  std::int64_t n, k;
  PlaneWidths widths;
  std::int64_t channels[kMaxPlanes];
  const std::uint8_t* plane[kMaxPlanes];
  std::uint8_t* codes;  // out [k][n]; bits of planes that are not stored are 0
};
Status unpack(const UnpackParams& params, const Executor& executor);

// Grades of the stored channels for each section of the outputs and row of x.
struct GradeParams {
  const void* x;  // [m][k]
  std::int64_t m;
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;
  PackedWeight weight;  // only n, k, widths, channels and channel_order are read
  Grading grading;
  std::uint8_t* grades;  // out [sections][m][k]
};
Status grade(const GradeParams& params, const Executor& executor);

// The transformed input of a layer.
struct PrepareParams {
  const void* x;  // [m][k], or [m][2k] where it is gated
  std::int64_t m, k;
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;            // of x, the norm's weight and out
  InputTransform transform;
  void* out;  // [m][k]
};
Status prepare(const PrepareParams& params, const Executor& executor);

// Dense weights at one grade (a channel with fewer stored planes: at its last), for outputs
// [n_begin, n_end), n_begin a multiple of 128: out[j][i] = W[n_begin + i][j], j the input feature (not the stored
// channel).
struct DequantizeParams {
  PackedWeight weight;
  int grade;  // 0..planes
  std::int64_t n_begin, n_end;
  Dtype dtype;
  void* out;  // [k][n_end - n_begin]
};
Status dequantize(const DequantizeParams& params, const Executor& executor);

// y[r] = W(grades of x[r]) x[r] + bias, each row graded on its own; float32 accumulation.
struct GemvParams {
  const void* x;  // [m][k]
  std::int64_t m;
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;            // of x, bias and y
  PackedWeight weight;
  Grading grading;
  const void* bias;  // [n] or null
  void* y;           // out [m][n], contiguous
  float* read_bits;  // out [m] mean bits read per weight, or null
  Isa isa;
};
Status gemv(const GemvParams& params, const Executor& executor);

}  // namespace grinqh
