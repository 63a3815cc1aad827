// What a launch of the GEMV's kernels is told (gemv_kernel.cuh): a layer, its plan and the rows, as a block needs them.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "layout.h"
#include "plan.h"

namespace grinqh::cuda::detail {

struct Subplane {
  const std::uint8_t* runs;  // [tiles][channels][run]
  int channels;
  int width;  // 1 or 2
  int run;    // bytes
};

// A section of the outputs: the blocks that work for it, its tiles and outputs.
struct SectionArgs {
  int first_column, columns;
  int first_tile, end_tile;
  int begin, end;
};

__host__ __device__ constexpr int item(std::uint64_t table, int i) { return static_cast<int>(table >> (4 * i) & 15); }

// 2^(1 - bits): what a unit of a subplane's bits weighs.
__device__ __forceinline__ float unit_weight(int bits) { return __int_as_float((128 - bits) << 23); }

// The first 64 bytes are what every block needs first: constant memory arrives by such lines.
struct alignas(64) GemvArgs {
  int slices, columns;
  int k_warp_bits;  // log2 of the warps that share a tile
  int chunks;       // of 32 channels
  int k;
  int sum_buffers;     // of a group
  int prefetch_slabs;  // of the first subplane that each warp fetches to L2 before x is known
  int subs;
  const std::int32_t* order;
  const float* channel_weight;
  const __half* scale_bound;  // [k]
  const __half* scale;        // [tiles][k][blocks]

  const void* x;
  std::int64_t x_stride;
  const float* thresholds;
  const float* gain;
  const float* factor;
  const void* norm_weight;  // [k] or null
  float norm_eps;
  int gated;
  Dtype dtype;
  int m, n, tiles;
  int slice_channels;  // at most, in one slice; whole slabs
  Subplane sub[kMaxSubplanes];
  // Small tables in one register each, four bits an item.
  std::uint64_t grade_of;                       // by subplane: the lowest grade that reads it
  std::uint64_t bits_of;                        // by subplane: bits down to it
  unsigned one_bit;                             // by subplane, one bit: it has 1 bit
  int capacity;                                 // entries of all lists
  std::uint32_t scale_bytes, tile_scale_bytes;  // of a channel's block scales in a tile, and of a tile's
  const float* row_scale;
  const void* bias;
  const void* residual;  // [m][n] or null
  void* y;
  float* partial;      // [slices][m][slots][kTile]
  unsigned* arrivals;  // [row groups][slots][sharers]
  int slots;
  int sharer_bits;  // log2 of the warps of a tile that turn its sums into results
  int planes, sections;
  SectionArgs section[kMaxSections];
  int overlap;  // 1: programmatic dependent launch
};

}  // namespace grinqh::cuda::detail
