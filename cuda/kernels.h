// The CUDA backend's entries: plain structs and a stream in, a Status out. Nothing here waits for the
// GPU. Device pointers throughout; a PackedWeight's planes and block scales are in tile order (layout.h).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "grinqh/types.h"

namespace grinqh::cuda {

// How a GEMV is cut into blocks. It depends on the shape and the GPU only, never on the rows of x:
// the split of K decides the order of the float32 sums, and a row's result must not know its batch.
struct GemvPlan {
  int slices = 1;     // parts of K; a block grades one of them
  int k_warps = 1;    // warps of a block that share a tile; the others take other tiles
  int columns = 1;    // blocks for each slice; each takes every columns-th group of tiles
};
GemvPlan plan_gemv(std::int64_t n, std::int64_t k, int multiprocessors);

struct GemvParams {
  const void* x;          // [m][k]
  std::int64_t m;         // 1..16
  std::int64_t x_stride;  // elements from row to row
  Dtype dtype;            // of x, bias and y
  PackedWeight weight;
  Grading grading;           // with a budget, `factor` holds what fit_budget found
  const float* factor;       // [m] scales of the thresholds, or null for ones
  const void* bias;          // [n] or null
  void* y;                   // out [m][n], contiguous
  float* partial;            // workspace of gemv_partial_count floats
  unsigned* arrivals;        // gemv_arrival_count zeros; left zero
  GemvPlan plan;
};
std::int64_t gemv_partial_count(const GemvPlan& plan, std::int64_t n, std::int64_t m);
std::int64_t gemv_arrival_count(std::int64_t n, std::int64_t m);
Status gemv(const GemvParams& params, cudaStream_t stream);

// Canonical order to tile order and back, one plane or the block scales at a time.
Status repack_plane(const std::uint8_t* plane, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream);
Status unpack_plane(const std::uint8_t* tiles, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream);
Status repack_scale(const std::uint16_t* scale, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream);
Status unpack_scale(const std::uint16_t* tiles, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream);

}  // namespace grinqh::cuda
