// The CUDA backend's entries: plain structs and a stream in, a Status out. Nothing here waits for the
// GPU. Device pointers throughout; a PackedWeight's planes and block scales are in tile order (layout.h).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "grinqh/types.h"
#include "plan.h"

namespace grinqh::cuda {

// The transformed input of a layer by itself (core.h).
struct PrepareParams {
  const void* x;  // [m][k], or [m][2k] where it is gated
  std::int64_t m, k;
  std::int64_t x_stride;     // elements from row to row
  Dtype dtype;               // of x, the norm's weight and out
  InputTransform transform;  // may be nothing with an order
  // [k], or null. With it x has 16 bits and k is at most kMostProductK, and out is x as `product` takes it (product.h),
  // column c of feature order[c].
  const std::int32_t* order;
  int tile_rows;  // with an order
  bool overlap;   // let the launch overlap the previous kernel's end: sm_90 or later
  void* out;      // [m][k], or product_input_size elements
};
Status prepare(const PrepareParams& params, cudaStream_t stream);

// y[r] = W(grades of x[r]) x[r] + bias for every row on its own (core.h). With a transform, x[r] stands for the
// transformed row; a residual is added to the result after it is rounded.
struct GemvParams {
  const void* x;  // [m][k]
  std::int64_t m;
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;            // of x, bias and y
  PackedWeight weight;
  Grading grading;
  const float* factor;  // [m] of fit_budget, or null without a budget
  const void* bias;     // [n] or null
  InputTransform transform;
  const void* residual;  // [m][n], contiguous, or null
  void* y;               // out [m][n], contiguous
  GemvPlan plan;         // of plan_gemv, for these n, k and m
  bool overlap;          // let the launch overlap the previous kernel's end: sm_90 or later
  float* partial;        // workspace of gemv_partial_count floats
  unsigned* arrivals;    // workspace of gemv_counter_count zeros; left zero (see counters.h)
};
Status gemv(const GemvParams& params, cudaStream_t stream);

// Grades of the stored channels for each section of the outputs and row of x, and what they add up to.
struct GradeParams {
  const void* x;  // [m][k]
  std::int64_t m;
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;
  PackedWeight weight;  // only k, widths, channels and channel_order are read
  Grading grading;
  const float* factor;   // [m] of fit_budget, or null
  std::uint8_t* grades;  // out [sections][m][k], or null
  float* read_bits;      // out [m] mean bits read per weight, or null
};
Status grade(const GradeParams& params, cudaStream_t stream);

// For each row the smallest factor of the thresholds that keeps it within grading.budget.
Status fit_budget(const GradeParams& params, float* factor, cudaStream_t stream);

// Dense weights of the tiles [tile_begin, tile_end) at one grade (a channel with fewer stored planes: at its
// last): out[j][i] = W[256 * tile_begin + i][j], j the input feature.
struct DequantizeParams {
  PackedWeight weight;
  int grade;  // 0..planes
  std::int64_t tile_begin, tile_end;
  Dtype dtype;
  void* out;  // [k][outputs], outputs those of the tiles that exist
};
Status dequantize(const DequantizeParams& params, cudaStream_t stream);

// Canonical order to tile order and back, one plane or the block scales at a time.
Status repack_plane(const std::uint8_t* plane, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream);
Status unpack_plane(const std::uint8_t* tiles, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream);
Status repack_scale(const std::uint16_t* scale, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream);
Status unpack_scale(const std::uint16_t* tiles, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream);

// Makes what was written on the stream so far visible to kernels that overlap the one before them. They read a layer's
// tables (order, channel weights, scales; many rows the planes, too) before they wait for it: this launches an empty
// kernel for them to overlap, which itself begins when everything before it is done.
Status settle(cudaStream_t stream);

}  // namespace grinqh::cuda
