// Products of many rows with all stored planes, on the tensor cores of sm_90a: prompts and large batches.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "grinqh/types.h"
#include "layout.h"
#include "plan.h"

namespace grinqh::cuda {

// How a product is cut into blocks, each of which takes a tile of outputs, some rows and all channels or a slice of
// them.
struct ProductPlan {
  int rows = 64;           // of a block: 64 or 128
  int slices = 1;          // of the channels: up to kMostSlices. Their blocks form a cluster, which adds them up.
  std::int64_t whole = 0;  // tiles before these that are not cut; a cluster takes `slices` of them
};

inline constexpr int kMostSlices = 8;

// Blocks that run at once where they form clusters of so many: clusters do not use every multiprocessor.
struct ProductRoom {
  int blocks[kMostSlices + 1];  // of clusters of 1..kMostSlices
};

// For more rows, making the weights dense once and cuBLAS are faster on an H100 (docs/kernel-notes.md, Prompts).
inline constexpr std::int64_t kMostProductRows = 512;

inline constexpr int kProductChannels = 64;             // a block's step
inline constexpr std::int64_t kMostProductK = 1 << 16;  // a scale, which is at most K^1/2, times 128 fits float16

constexpr std::int64_t product_steps(std::int64_t k) { return (k + kProductChannels - 1) / kProductChannels; }

// x as the kernel takes it: columns in the order of the stored channels, 0 beyond the last, in groups of eight. For
// each tile of `rows` rows and each step of 64 columns, row after row the step's eight groups, exchanged as matrix
// products have them (wgmma.cuh). Where eight columns of a row begin; rows beyond the last may hold anything.
GRINQH_HOST_DEVICE constexpr std::int64_t product_input(std::int64_t row, std::int64_t group, std::int64_t steps,
                                                        int rows) {
  const std::int64_t block = row / rows * steps + group / 8, in_block = row % rows;
  return ((block * rows + in_block) * 8 + (group % 8 ^ row % 8)) * 8;
}
constexpr std::int64_t product_input_size(std::int64_t m, std::int64_t k, int rows) {
  return (m + rows - 1) / rows * rows * product_steps(k) * kProductChannels;
}

// Whether the kernel takes a layer: planes of 2 bits and more, blocks that whole matrix tiles share, 16-bit x.
constexpr bool has_product(const PackedWeight& weight, Dtype dtype) {
  bool two_bits = true;
  for (int p = 0; p < weight.widths.count; ++p) two_bits = two_bits && weight.widths.width[p] > 1;
  const bool whole_copies = weight.k * blocks_per_tile(static_cast<int>(weight.block)) % 8 == 0;  // of 16 bytes
  return two_bits && weight.block >= 64 && whole_copies && weight.k > 0 && weight.k <= kMostProductK &&
         dtype != Dtype::f32;
}

// The least time, in steps: turns of the GPU with whole tiles, then the tiles that are left, in slices which fill the
// last turn. Each turn has some steps for its beginning and end.
constexpr ProductPlan plan_product(std::int64_t n, std::int64_t k, std::int64_t m, const ProductRoom& room) {
  constexpr std::int64_t kFixedSteps = 6, kLeastSteps = 4;
  ProductPlan plan;
  plan.rows = m <= 64 ? 64 : 128;
  const std::int64_t tiles = tile_count(n) * ((m + plan.rows - 1) / plan.rows), steps = product_steps(k);
  std::int64_t least = 0;
  for (int slices = 1; slices <= kMostSlices; ++slices) {
    const std::int64_t each = (steps + slices - 1) / slices, fitting = std::max(room.blocks[slices], slices);
    const std::int64_t turns = tiles / fitting, cut = tiles % fitting * slices;
    const std::int64_t cost = turns * (steps + kFixedSteps) +
                              (cut + fitting - 1) / fitting * (each + kFixedSteps + (slices > 1 ? slices : 0));
    if (slices > 1 && (each < kLeastSteps || cost >= least)) continue;
    least = cost;
    plan.slices = slices;
    plan.whole = turns * fitting;
  }
  return plan;
}

// y[r] = W x[r] + bias, with every stored plane. A residual is added to the result after it is rounded.
struct ProductParams {
  const void* x;  // of product_input_size elements
  std::int64_t m;
  Dtype dtype;  // of x, bias, residual and y: f16 or bf16
  PackedWeight weight;
  const void* bias;      // [n] or null
  const void* residual;  // [m][n], contiguous, or null
  void* y;               // out [m][n], contiguous
  ProductPlan plan;
};
Status product(const ProductParams& params, cudaStream_t stream);

// Whether the kernel was built for this GPU.
bool product_runs_on(const Gpu& gpu);

// What the current GPU has room for; asked of it once.
Status product_room(ProductRoom* room);

}  // namespace grinqh::cuda
