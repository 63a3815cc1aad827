// How a GEMV is cut into blocks: a pure function of the shape and the GPU, tested without one.
#pragma once
#include <algorithm>
#include <cstdint>

#include "grinqh/types.h"
#include "layout.h"

namespace grinqh::cuda {

// A block takes one slice of K and, one after the other, tiles of outputs. Its warps form groups; the
// warps of a group share a tile and its slabs, and the slices' sums of a tile meet in global memory.
//
//            slices ->
//   columns  [block][block][block]      block: warps / k_warps groups, each at a tile of its own
//      |     [block][block][block]
//
// A column works for one section of the outputs, whose thresholds it grades with. A section may begin within a tile:
// that tile is then worked on twice, in two slots, tile + section.
struct GemvPlan {
  int slices = 1;                           // parts of K
  int k_warps = 2;                          // warps that share a tile: 2, 4, 8 or 16
  int sharers = 2;                          // of those: the ones that turn its sums into results
  int columns = 1;                          // blocks for each slice
  int section_columns[kMaxSections] = {1};  // those of each section, one section after the other
  int sections = 1;
  int turns = 1;           // most tiles that a group takes
  std::int64_t slots = 0;  // of tiles
  int prefetch_slabs = 0;  // slabs of the first subplane that a warp fetches to L2 before x is known
  bool large = true;       // the kernels for GPUs with much shared memory
};

struct GemvShape {
  std::int64_t n = 0, k = 0, m = 1;
  int subplanes = 4;
  bool one_bit = false;  // a plane has 1 bit
  Sections sections = {};
  int block = 64;  // outputs that share a scale
  bool operator==(const GemvShape&) const = default;
};

struct Gpu {
  int multiprocessors = 0;
  int shared_bytes = 0;  // most that a block may use
  int capability = 0;    // 80 for 8.0
  bool operator==(const Gpu&) const = default;
};

// A group adds up the next tile's sums beside those of the one before.
constexpr int sum_buffers(int turns) { return turns > 1 ? 2 : 1; }

// One kernel instance: rows it takes at once, warps of a block, copies in flight, warps that split a tile's outputs.
// 16 warps leave each thread 128 registers: enough for the sums of two rows, or of half the outputs. What is fastest
// was measured (docs/kernel-notes.md).
struct GemvInstance {
  int rows, warps, stages, split;
  constexpr int rings() const { return warps / split; }  // of slabs
};
constexpr GemvInstance gemv_instance(std::int64_t m, bool one_bit, bool large) {
  const int most = large ? 8 : 4;
  const int rows = m == 1 ? 1 : m == 2 ? 2 : m <= 4 || most == 4 ? 4 : 8;
  if (!large) return {rows, 8, 2, 1};
  if (rows <= 2) return {rows, 16, 3, 1};
  if (rows == 4) return {4, 16, one_bit ? 3 : 4, 2};
  return one_bit ? GemvInstance{8, 8, 2, 1} : GemvInstance{8, 16, 3, 2};
}

inline constexpr int kMostSliceChunks = 32;      // of kSlab channels, in one slice
inline constexpr int kMostSumsRow = kTile + 80;  // ints of a row's sums with the gaps between its blocks

// More rows than an instance takes are further layers of the grid.
constexpr std::int64_t gemv_layers(std::int64_t m, bool large) {
  const int rows = gemv_instance(m, false, large).rows;
  return (m + rows - 1) / rows;
}

struct TileRange {
  std::int64_t begin, end;
};
inline TileRange section_tiles(const Sections& sections, int section, std::int64_t n) {
  const auto [begin, end] = sections.outputs(section, n);
  return {begin / kTile, tile_count(end)};
}

namespace plan_detail {

inline constexpr int kLargeShared = 200 * 1024;  // A100, H100, B200; 99 KB elsewhere
constexpr int stage_bytes(int block) { return kSlab * (run_bytes(2) + 2 * blocks_per_tile(block)); }

// The shared memory that an instance needs: copies in flight, sums of the groups, and for each channel and subplane an
// entry of a list with a value for each row.
constexpr int shared_bytes(const GemvInstance& instance, int block, int k_warps, int turns, int subplanes,
                           int slice_chunks) {
  return instance.rings() * instance.stages * stage_bytes(block) +
         sum_buffers(turns) * (instance.warps / k_warps) * instance.rows * kMostSumsRow * 4 +
         slice_chunks * kSlab * subplanes * 4 * (1 + instance.rows) + 2048;
}

// It bounds a slice, for the instances of any number of rows: with all warps on one tile, any number of turns must fit.
constexpr int most_slice_chunks(const GemvShape& shape, const Gpu& gpu) {
  const bool large = gpu.shared_bytes >= kLargeShared;
  int chunks = kMostSliceChunks;
  for (int m = 1; m <= 8; m *= 2) {
    const GemvInstance instance = gemv_instance(m, shape.one_bit, large);
    while (chunks > 1 &&
           shared_bytes(instance, shape.block, instance.warps, 2, shape.subplanes, chunks) > gpu.shared_bytes)
      --chunks;
  }
  return chunks;
}

// What a cut costs, in nanoseconds (docs/kernel-notes.md): a channel of a tile, in bytes, and by how much every tile
// that a block reads from at once slows it; a slab, in instructions of a warp; a round of grading; a slice, and its
// sums of a tile; a turn, and each of its rows.
constexpr double kPerChannelTile = 0.95, kSlowedByGroup = 0.04, kPerSlab = 31, kPerRound = 1000, kPerSlice = 120,
                 kPerSliceTile = 0.5, kPerTurn = 600, kPerTurnRow = 200;

struct Cut {
  GemvPlan plan;
  double cost = 1e30;
};

// Shares out at most so many columns, but one for each section at least, so that the slowest section has few turns.
inline void share_columns(const std::int64_t* wanted, std::int64_t most, GemvPlan& plan) {
  for (int s = 0; s < plan.sections; ++s) plan.section_columns[s] = 1;
  for (plan.columns = plan.sections; plan.columns < most; ++plan.columns) {
    int slowest = 0;
    for (int s = 1; s < plan.sections; ++s) {
      if (wanted[s] * plan.section_columns[slowest] > wanted[slowest] * plan.section_columns[s]) slowest = s;
    }
    if (plan.section_columns[slowest] >= wanted[slowest]) return;
    ++plan.section_columns[slowest];
  }
}

inline Cut best_with_slices(const GemvShape& shape, const Gpu& gpu, int slices, const GemvInstance& instance) {
  Cut best;
  const int warps = instance.warps, chunks = static_cast<int>((shape.k + kSlab - 1) / kSlab);
  const int sections = shape.sections.count;
  std::int64_t tiles[kMaxSections] = {}, wanted[kMaxSections] = {};  // of each section: tiles; turns with one column
  for (int s = 0; s < sections; ++s) {
    const TileRange range = section_tiles(shape.sections, s, shape.n);
    tiles[s] = range.end - range.begin;
  }
  const int slice_chunks = (chunks + slices - 1) / slices;
  const double fixed = (slice_chunks + warps - 1) / warps * kPerRound +
                       slices * (kPerSlice + static_cast<double>(tile_count(shape.n)) * kPerSliceTile);
  for (int k_warps = 2; k_warps <= warps; k_warps *= 2) {
    const int groups = warps / k_warps;
    for (int s = 0; s < sections; ++s) wanted[s] = (tiles[s] + groups - 1) / groups;
    GemvPlan plan{.slices = slices, .k_warps = k_warps, .sections = sections};
    share_columns(wanted, gpu.multiprocessors / slices, plan);
    std::int64_t turns = 1;  // of the slowest section
    for (int s = 0; s < sections; ++s) {
      turns = std::max(turns, (wanted[s] + plan.section_columns[s] - 1) / plan.section_columns[s]);
    }
    plan.turns = static_cast<int>(turns);
    if (shared_bytes(instance, shape.block, k_warps, plan.turns, shape.subplanes, slice_chunks) > gpu.shared_bytes)
      continue;
    // One tile's results are soon written by few warps, those of many tiles by all.
    plan.sharers = turns > 1 ? k_warps : std::min(k_warps, 2 * instance.rows);
    const double bytes = plan.turns * groups * slice_chunks * kSlab * kPerChannelTile * (1 + groups * kSlowedByGroup);
    const int slabs = plan.turns * (3 * slice_chunks + 4) / 2;  // at 3 read bits; each list ends within a slab
    const int rings = k_warps / instance.split;
    const double cost = fixed + bytes + (slabs + rings - 1) / rings * instance.rings() * kPerSlab +
                        (plan.turns - 1) * (kPerTurn + instance.rows * kPerTurnRow);
    if (cost < best.cost) best = {plan, cost};
  }
  return best;
}

}  // namespace plan_detail

// `slices` decides the order of the float32 sums, so it does not depend on m: a row's result must not know
// its batch.
inline GemvPlan plan_gemv(const GemvShape& shape, const Gpu& gpu) {
  using plan_detail::Cut;
  const bool large = gpu.shared_bytes >= plan_detail::kLargeShared;
  const int chunks = static_cast<int>((shape.k + kSlab - 1) / kSlab);
  const int most = plan_detail::most_slice_chunks(shape, gpu), least = std::max(1, (chunks + most - 1) / most);
  const auto cut = [&](int slices, std::int64_t m) {
    return plan_detail::best_with_slices(shape, gpu, slices, gemv_instance(m, shape.one_bit, large));
  };
  Cut best;
  for (int slices = least; slices <= std::max(least, std::min(chunks, 48)); ++slices) {
    if (const Cut next = cut(slices, 1); next.cost < best.cost) best = next;
  }
  GemvPlan plan = shape.m == 1 ? best.plan : cut(best.plan.slices, shape.m).plan;
  plan.slots = tile_count(shape.n) + shape.sections.count - 1;
  plan.prefetch_slabs = 2 / gemv_instance(shape.m, shape.one_bit, large).split;
  plan.large = large;
  return plan;
}

// Workspace: floats for the slices' sums, and counters, one for each sharer of a tile in every layer of the grid, that
// are zero before and after.
constexpr std::int64_t gemv_partial_count(const GemvPlan& plan, std::int64_t m) {
  return plan.slices > 1 ? plan.slices * m * plan.slots * kTile : 0;
}
constexpr std::int64_t gemv_counter_count(const GemvPlan& plan, std::int64_t m) {
  return gemv_layers(m, plan.large) * plan.slots * plan.sharers;
}

}  // namespace grinqh::cuda
