// How a GEMV is cut into blocks: a pure function of the shape, tested without a GPU.
#pragma once
#include <cstdint>

#include "layout.h"

namespace grinqh::cuda {

// A block takes one slice of K and, one after the other, tiles of outputs. Its warps form groups; the
// warps of a group share a tile and its slabs, and a group meets the next slices' sums in global memory.
//
//            slices ->
//   columns  [block][block][block]      block: kWarps / k_warps groups, each at a tile of its own
//      |     [block][block][block]
//
// `slices` decides the order of the float32 sums, so it depends on the shape and the GPU only, never on
// the rows of x: a row's result must not know its batch.
struct GemvPlan {
  int slices = 1;         // parts of K
  int k_warps = 1;        // warps that share a tile: 1, 2, 4, 8 or 16
  int columns = 1;        // blocks for each slice
  bool drawn = false;     // groups draw their next tile from a counter instead of a fixed stride
  bool prefetch = false;  // fetch the first plane to L2 before x is known
};

// What the cut depends on.
struct GemvShape {
  std::int64_t n = 0, k = 0, m = 1;
  int subplanes = 4;
  bool one_bit = false;  // a plane has 1 bit
};

// Warps of a block for the kernel that takes this many rows at once: 16 leave each thread 128 registers.
constexpr int gemv_warps(int rows, bool one_bit) { return rows == 1 && !one_bit ? 16 : 8; }
// Rows that one kernel takes; more rows are further layers of the grid.
constexpr int gemv_rows(std::int64_t m) { return m == 1 ? 1 : m == 2 ? 2 : 4; }

GemvPlan plan_gemv(const GemvShape& shape, int multiprocessors);

// Workspace: floats for the slices' sums, and counters (one per tile, then one per slice, for each layer of
// the grid) that are zero before and after.
constexpr std::int64_t gemv_layers(std::int64_t m) { return (m + gemv_rows(m) - 1) / gemv_rows(m); }
constexpr std::int64_t gemv_partial_count(const GemvPlan& plan, std::int64_t n, std::int64_t m) {
  return plan.slices > 1 ? plan.slices * m * tile_count(n) * kTile : 0;
}
constexpr std::int64_t gemv_tile_counters(std::int64_t n, std::int64_t m) { return gemv_layers(m) * tile_count(n); }
constexpr std::int64_t gemv_counter_count(const GemvPlan& plan, std::int64_t n, std::int64_t m) {
  return gemv_tile_counters(n, m) + gemv_layers(m) * plan.slices;
}

}  // namespace grinqh::cuda
