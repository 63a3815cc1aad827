// The GEMV's entry: from a layer and its plan to a kernel (gemv_kernel.cuh).
#include "gemv_launch.cuh"
#include "kernels.h"

namespace grinqh::cuda {
namespace {

using detail::GemvArgs;

// Fills what the kernel needs from the layer and the plan.
GemvArgs device_args(const GemvParams& p) {
  const PackedWeight& w = p.weight;
  GemvArgs a{};
  a.x = p.x;
  a.x_stride = p.x_stride;
  a.scale = reinterpret_cast<const __half*>(w.block_scale);
  a.scale_bound = a.scale + tile_count(w.n) * blocks_per_tile(static_cast<int>(w.block)) * w.k;
  a.row_scale = w.row_scale;
  a.gain = w.gain;
  a.order = w.channel_order;
  a.channel_weight = p.grading.channel_weight;
  a.thresholds = p.grading.thresholds;
  a.factor = p.factor;
  a.bias = p.bias;
  a.norm_weight = p.transform.norm_weight;
  a.norm_eps = p.transform.norm_eps;
  a.gated = p.transform.gated ? 1 : 0;
  a.residual = p.residual;
  a.y = p.y;
  a.partial = p.partial;
  a.arrivals = p.arrivals;
  a.dtype = p.dtype;
  a.m = static_cast<int>(p.m);
  a.n = static_cast<int>(w.n);
  a.k = static_cast<int>(w.k);
  a.tiles = static_cast<int>(tile_count(w.n));
  a.planes = w.widths.count;
  a.slots = static_cast<int>(p.plan.slots);
  a.sections = p.plan.sections;
  int column = 0;
  for (int s = 0; s < a.sections; ++s) {
    const auto [begin, end] = p.grading.sections.outputs(s, w.n);
    const auto [first_tile, end_tile] = section_tiles(p.grading.sections, s, w.n);
    a.section[s] = {column,
                    p.plan.section_columns[s],
                    static_cast<int>(first_tile),
                    static_cast<int>(end_tile),
                    static_cast<int>(begin),
                    static_cast<int>(end)};
    column += p.plan.section_columns[s];
  }
  int bits = 0;
  for (int plane = 0; plane < w.widths.count; ++plane) {
    const int width = sub_width(w.widths.width[plane]);
    const std::int64_t size = tile_count(w.n) * w.channels[plane] * run_bytes(width);
    for (int i = 0; i < sub_count(w.widths.width[plane]); ++i) {
      bits += width;
      a.sub[a.subs] = {w.plane[plane] + i * size, static_cast<int>(w.channels[plane]), width, run_bytes(width)};
      a.grade_of |= static_cast<std::uint64_t>(plane + 1) << (4 * a.subs);
      a.bits_of |= static_cast<std::uint64_t>(bits) << (4 * a.subs);
      a.one_bit |= static_cast<unsigned>(width == 1) << a.subs;
      ++a.subs;
    }
  }
  a.slices = p.plan.slices;
  a.sum_buffers = sum_buffers(p.plan.turns);
  a.prefetch_slabs = p.plan.prefetch_slabs;
  a.overlap = p.overlap ? 1 : 0;
  while (1 << a.k_warp_bits < p.plan.k_warps) ++a.k_warp_bits;
  while (1 << a.sharer_bits < p.plan.sharers) ++a.sharer_bits;
  a.columns = p.plan.columns;
  a.chunks = (a.k + kSlab - 1) / kSlab;
  a.slice_channels = (a.chunks + a.slices - 1) / a.slices * kSlab;
  a.capacity = a.slice_channels * a.subs;
  a.scale_bytes = static_cast<std::uint32_t>(2 * blocks_per_tile(static_cast<int>(w.block)));
  a.tile_scale_bytes = a.scale_bytes * static_cast<std::uint32_t>(a.k);
  return a;
}

}  // namespace

Status gemv(const GemvParams& params, cudaStream_t stream) {
  if (Status status = check_transform(params.transform); !status.ok()) return status;
  if (params.m == 0 || params.weight.n == 0) return {};
  const GemvArgs args = device_args(params);
  const bool around = !params.transform.nothing() || params.residual != nullptr;
  return around ? detail::launch_gemv<true>(args, params.weight.block, params.plan.large, stream)
                : detail::launch_gemv<false>(args, params.weight.block, params.plan.large, stream);
}

}  // namespace grinqh::cuda
