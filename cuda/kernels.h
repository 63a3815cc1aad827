// The CUDA backend's entries: plain structs and a stream in, a Status out. Nothing here waits for the
// GPU. Device pointers throughout; a PackedWeight's planes and block scales are in tile order (layout.h).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "grinqh/types.h"
#include "plan.h"

namespace grinqh::cuda {

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
  unsigned* arrivals;        // workspace of gemv_counter_count zeros; left zero
  GemvPlan plan;
};
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
