// Dense weights at one grade: what prefill multiplies with. A warp makes 256 outputs of one channel; eight
// neighbouring outputs of a lane have their bits at the same place of eight bytes, so the bytes are read one by
// one from a run that lies in L1, and the results leave as 16 or 32 bytes a lane.
#include "device.cuh"
#include "kernels.h"
#include "layout.h"

namespace grinqh::cuda {
namespace {

constexpr int kWarps = 8;

struct DequantizeArgs {
  const std::uint8_t* runs[kMaxSubplanes];
  std::int64_t channels[kMaxSubplanes];
  int width[kMaxSubplanes], plane[kMaxSubplanes];
  int subs;  // of the planes up to the grade
  const __half* scale;
  const float* row_scale;
  const float* gain;
  const std::int32_t* order;
  int block;
  std::int64_t n, k, tile_begin, outputs;
  Dtype dtype;
  void* out;
};

__global__ void __launch_bounds__(kWarps * 32) dequantize_kernel(const __grid_constant__ DequantizeArgs a) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (c >= a.k) return;
  const std::int64_t tile = a.tile_begin + blockIdx.y;
  const int first = threadIdx.x % 32 * 8;  // this lane's outputs in the tile
  unsigned top[8] = {};
  int bits = 0, grade = 0;
  for (int s = 0; s < a.subs && c < a.channels[s]; ++s) {
    const int width = a.width[s];
    const std::uint8_t* run = a.runs[s] + run_offset(tile, c, a.channels[s], run_bytes(width));
    for (int i = 0; i < 8; ++i) {
      const RunPosition at = run_position(first + i, width);
      top[i] = top[i] << width | (run[at.byte] >> at.shift & ((1u << width) - 1));
    }
    bits += width;
    grade = a.plane[s] + 1;
  }
  const int blocks = blocks_per_tile(a.block);
  const float scale = __half2float(a.scale[(tile * a.k + c) * blocks + first / a.block]);
  const float gain = grade ? a.gain[grade - 1] : 0.0f;
  const std::int64_t to = a.order[c] * a.outputs + blockIdx.y * kTile + first;
  float value[8];
  for (int i = 0; i < 8; ++i) {
    const std::int64_t n = tile * kTile + first + i;
    // The products in the order of the CPU kernels, so that both give the same bits.
    value[i] = grade && n < a.n ? scale * level(top[i], bits) * gain * a.row_scale[n] : 0.0f;
  }
  const bool whole = tile * kTile + first + 8 <= a.n && a.outputs % 8 == 0;
  if (whole && a.dtype == Dtype::f16) {
    __half2 pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<__half*>(a.out) + to) = *reinterpret_cast<const uint4*>(pair);
  } else if (whole && a.dtype == Dtype::bf16) {
    __nv_bfloat162 pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(a.out) + to) = *reinterpret_cast<const uint4*>(pair);
  } else {
    for (int i = 0; i < 8 && tile * kTile + first + i < a.n; ++i) store_number(a.out, to + i, a.dtype, value[i]);
  }
}

}  // namespace

Status dequantize(const DequantizeParams& params, cudaStream_t stream) {
  const PackedWeight& w = params.weight;
  if (w.n == 0 || w.k == 0 || params.tile_begin >= params.tile_end) return {};
  DequantizeArgs a{};
  for (int plane = 0; plane < params.grade; ++plane) {
    const int width = sub_width(w.widths.width[plane]);
    const std::int64_t size = tile_count(w.n) * w.channels[plane] * run_bytes(width);
    for (int i = 0; i < sub_count(w.widths.width[plane]); ++i) {
      a.runs[a.subs] = w.plane[plane] + i * size;
      a.channels[a.subs] = w.channels[plane];
      a.width[a.subs] = width;
      a.plane[a.subs] = plane;
      ++a.subs;
    }
  }
  a.scale = reinterpret_cast<const __half*>(w.block_scale);
  a.row_scale = w.row_scale;
  a.gain = w.gain;
  a.order = w.channel_order;
  a.block = static_cast<int>(w.block);
  a.n = w.n;
  a.k = w.k;
  a.tile_begin = params.tile_begin;
  a.outputs = (params.tile_end * kTile < w.n ? params.tile_end * kTile : w.n) - params.tile_begin * kTile;
  a.dtype = params.dtype;
  a.out = params.out;
  const dim3 grid(static_cast<unsigned>((w.k + kWarps - 1) / kWarps),
                  static_cast<unsigned>(params.tile_end - params.tile_begin));
  dequantize_kernel<<<grid, kWarps * 32, 0, stream>>>(a);
  return launched("dequantize");
}

}  // namespace grinqh::cuda
