#include "plan.h"

#include <algorithm>

namespace grinqh::cuda {
namespace {

// Shared memory bounds a slice: at four rows an entry of the list takes 20 bytes and a channel has one for
// each subplane, beside 74 to 84 KB of copies in flight and 32 KB of sums.
constexpr int most_slice_chunks(int subplanes) { return (subplanes <= 5 ? 1024 : 512) / kSlab; }

// What a cut costs, in nanoseconds of an H100 (docs/kernel-notes.md): streaming, the grading of a slice,
// the reduction over slices and the work between two tiles of a group.
constexpr double kPerChannelTile = 4.5, kPerRound = 500, kPerSlice = 60, kPerTurn = 500;

struct Cut {
  GemvPlan plan;
  double cost;
};

Cut best_with_slices(std::int64_t tiles, int chunks, int slices, int warps, int multiprocessors) {
  Cut best{{}, 1e30};
  const int slice_chunks = (chunks + slices - 1) / slices;
  const double fixed = (slice_chunks + warps - 1) / warps * kPerRound + slices * kPerSlice;
  for (int k_warps = 1; k_warps <= warps; k_warps *= 2) {
    const int groups = warps / k_warps;
    const std::int64_t wanted = (tiles + groups - 1) / groups;
    const int columns = static_cast<int>(std::min<std::int64_t>(wanted, std::max(1, multiprocessors / slices)));
    const double turns = static_cast<double>(tiles) / (columns * groups);
    const bool drawn = turns >= 3;
    const double whole = drawn ? turns + 0.5 : static_cast<double>((wanted + columns - 1) / columns);
    const double cost = fixed + whole * (groups * slice_chunks * kSlab * kPerChannelTile) + (whole - 1) * kPerTurn;
    if (cost < best.cost) best = {{slices, k_warps, columns, drawn, false}, cost};
  }
  return best;
}

}  // namespace

GemvPlan plan_gemv(const GemvShape& shape, int multiprocessors) {
  const std::int64_t tiles = tile_count(shape.n);
  const int chunks = static_cast<int>((shape.k + kSlab - 1) / kSlab);
  const int most = most_slice_chunks(shape.subplanes), least = std::max(1, (chunks + most - 1) / most);
  const auto cut = [&](int slices, int rows) {
    return best_with_slices(tiles, chunks, slices, gemv_warps(rows, shape.one_bit), multiprocessors);
  };
  // The slices are chosen for one row, whatever m is.
  Cut best{{}, 1e30};
  for (int slices = least; slices <= std::max(least, std::min(chunks, 48)); ++slices) {
    if (const Cut next = cut(slices, 1); next.cost < best.cost) best = next;
  }
  GemvPlan plan = shape.m == 1 ? best.plan : cut(best.plan.slices, gemv_rows(shape.m)).plan;
  plan.prefetch = shape.n * shape.k <= 32'000'000;
  return plan;
}

}  // namespace grinqh::cuda
