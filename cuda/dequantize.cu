// Dense weights at one grade: what prefill multiplies with. A warp makes 256 outputs of one channel after the other.
//
// Loads: lane 4 g + j takes two bytes of each run, which hold the codes of the outputs
//     64 j + 16 r + 8 half + g       r = 0..3, half = 0..1
// and puts them into one byte for each output, byte 2 r + half of eight: first subplane by subplane, then three
// exchanges between the eight lanes of equal j transpose their 8 x 8 bytes, and the lane has the outputs
//     64 j + 8 g + 0..7
// whose values leave in one store.
#include "device.cuh"
#include "kernels.h"
#include "layout.h"

namespace grinqh::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kChannelsPerWarp = 8;

struct DequantizeArgs {
  const std::uint8_t* runs[kMaxSubplanes];
  int channels[kMaxSubplanes];  // 0 of those beyond the grade; never growing
  int width[kMaxSubplanes];
  int shift[kMaxSubplanes];           // of a subplane's bits in the eight bits of a code
  int last_plane[kMaxSubplanes + 1];  // of a channel that stores so many subplanes, -1 for none
  float middle[kMaxSubplanes + 1];    // of what code 0 then stands for: its level
  const __half* scale;
  const float* row_scale;
  const float* gain;
  const std::int32_t* order;
  int block, blocks, k;  // blocks in a tile
  std::int64_t n, tile_begin, outputs;
  Dtype dtype;
  void* out;
};

// Where a lane reads its tile's first channel.
template <int kSubs>
struct Sources {
  const std::uint8_t* run[kSubs];
  const __half* scale;
};

// What a lane needs of one channel, as it was loaded. Runs that the channel does not store are 0.
template <int kSubs>
struct Channel {
  unsigned run[kSubs];
  __half scale;
  float gain, middle;
  std::int32_t order;
};

// Eight bytes of a lane.
struct Bytes {
  unsigned low, high;
};

// Planes of 1 bit are rare: without them, at most four subplanes make the eight bits.
template <bool kOneBit>
constexpr int kSubsOf = kOneBit ? kMaxSubplanes : 4;

template <bool kOneBit>
__device__ __forceinline__ int width_of(const DequantizeArgs& a, int s) {
  return kOneBit ? a.width[s] : 2;
}

template <bool kOneBit, int kSubs = kSubsOf<kOneBit>>
__device__ __forceinline__ Sources<kSubs> sources_of(const DequantizeArgs& a, std::int64_t tile, int lane, int first) {
  Sources<kSubs> from;
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    const int width = width_of<kOneBit>(a, s);
    const int byte = width == 2 ? 2 * lane : lane / 4 * 4 + lane % 4 / 2 * 2;
    from.run[s] = a.runs[s] + run_offset(tile, 0, a.channels[s], run_bytes(width)) + byte;
  }
  from.scale = a.scale + tile * a.k * a.blocks + first / a.block;
  return from;
}

template <bool kOneBit, int kSubs = kSubsOf<kOneBit>>
__device__ __forceinline__ Channel<kSubs> load_channel(const DequantizeArgs& a, const Sources<kSubs>& from, int c) {
  Channel<kSubs> channel;
  int stored = 0;
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    channel.run[s] = 0;
    if (c >= a.channels[s]) continue;
    const std::uint8_t* run = from.run[s] + static_cast<std::int64_t>(c) * run_bytes(width_of<kOneBit>(a, s));
    channel.run[s] = *reinterpret_cast<const std::uint16_t*>(run);
    stored = s + 1;
  }
  const int plane = a.last_plane[stored];
  channel.scale = from.scale[static_cast<std::int64_t>(c) * a.blocks];
  channel.gain = plane < 0 ? 0.0f : a.gain[plane];
  channel.middle = a.middle[stored];
  channel.order = a.order[c];
  return channel;
}

// The lane's codes: the bits of all subplanes put together, the most significant on top, 0 where none is stored.
template <bool kOneBit, int kSubs = kSubsOf<kOneBit>>
__device__ __forceinline__ Bytes codes_of(const DequantizeArgs& a, const Channel<kSubs>& channel, int lane) {
  constexpr unsigned kFields = 0x03030303;
  Bytes code{};
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    unsigned run = channel.run[s];
    // A single bit lies where the lower one of two would, after a shift.
    if (kOneBit && a.width[s] == 1) run = run >> lane % 2 & 0x5555;
    const unsigned spread = run | run << 14;
    const int shift = kOneBit ? a.shift[s] : 6 - 2 * s;
    code.low += (spread & kFields) << shift;
    code.high += (spread >> 4 & kFields) << shift;
  }
  return code;
}

// A number that the compiler cannot compute again, to save a register, in every turn of a loop.
__device__ __forceinline__ unsigned kept(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Which bytes of two words a lane keeps and gives away in the exchanges of `transpose`, and how it puts them together.
struct Exchange {
  bool upper;
  unsigned keep2, give2, low2, high2, keep1, give1, low1, high1;
};

__device__ __forceinline__ Exchange exchange_of(int lane) {
  const bool upper2 = lane & 8, upper1 = lane & 4;
  return {(lane & 16) != 0,
          kept(upper2 ? 0x7632 : 0x5410),
          kept(upper2 ? 0x5410 : 0x7632),
          kept(upper2 ? 0x1054 : 0x5410),
          kept(upper2 ? 0x3276 : 0x7632),
          kept(upper1 ? 0x7531 : 0x6420),
          kept(upper1 ? 0x6420 : 0x7531),
          kept(upper1 ? 0x1504 : 0x5140),
          kept(upper1 ? 0x3726 : 0x7362)};
}

// Byte e of lane 4 g + j becomes byte g of lane 4 e + j. In each step a lane keeps one half of its bytes, by one bit of
// its g, and gives the other half to the lane that differs in this bit.
__device__ __forceinline__ Bytes transpose(Bytes own, const Exchange& by) {
  constexpr unsigned kAll = 0xffffffff;
  unsigned got = __shfl_xor_sync(kAll, by.upper ? own.low : own.high, 16);
  const Bytes quads = {by.upper ? got : own.low, by.upper ? own.high : got};

  unsigned mine = __byte_perm(quads.low, quads.high, by.keep2);
  got = __shfl_xor_sync(kAll, __byte_perm(quads.low, quads.high, by.give2), 8);
  const Bytes pairs = {__byte_perm(mine, got, by.low2), __byte_perm(mine, got, by.high2)};

  mine = __byte_perm(pairs.low, pairs.high, by.keep1);
  got = __shfl_xor_sync(kAll, __byte_perm(pairs.low, pairs.high, by.give1), 4);
  return {__byte_perm(mine, got, by.low1), __byte_perm(mine, got, by.high1)};
}

// level(code, bits) (format.h) for byte `i` of four codes that fill their bytes from the top, without conversions of
// integers: the byte is put into the mantissa of 32768. The result is exact: it and the offset have few bits.
constexpr float kNumber = 32768.0f, kStep = 1.0f / 128;
__device__ __forceinline__ float level_of(unsigned codes, int i, unsigned number, float offset) {
  return fmaf(__uint_as_float(__byte_perm(codes, number, 0x7404 | i << 4)), kStep, offset);
}

__device__ __forceinline__ void store(const DequantizeArgs& a, std::int64_t to, const float (&value)[8], int count) {
  const bool whole = count >= 8 && a.outputs % 8 == 0;
  if (whole && a.dtype == Dtype::f16) {
    __half2 pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<__half*>(a.out) + to) = *reinterpret_cast<const uint4*>(pair);
  } else if (whole && a.dtype == Dtype::bf16) {
    __nv_bfloat162 pair[4];
    for (int i = 0; i < 4; ++i) pair[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(a.out) + to) = *reinterpret_cast<const uint4*>(pair);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_number(a.out, to + i, a.dtype, value[i]);
    }
  }
}

template <bool kOneBit>
__global__ void __launch_bounds__(kWarps * 32) dequantize_kernel(const __grid_constant__ DequantizeArgs a) {
  const int lane = threadIdx.x % 32;
  const int first = 64 * (lane % 4) + 8 * (lane / 4);  // this lane's outputs in the tile
  const std::int64_t tile = a.tile_begin + blockIdx.y;
  const std::int64_t left = a.n - (tile * kTile + first);
  const int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
  float row_scale[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) row_scale[i] = i < count ? a.row_scale[tile * kTile + first + i] : 0.0f;

  const int begin = kWarps * kChannelsPerWarp * static_cast<int>(blockIdx.x) + static_cast<int>(threadIdx.x) / 32;
  const int end = min(begin + kWarps * kChannelsPerWarp, a.k);
  if (begin >= end) return;
  const auto from = sources_of<kOneBit>(a, tile, lane, first);
  const Exchange exchange = exchange_of(lane);
  const unsigned number = kept(__float_as_uint(kNumber));
  auto next = load_channel<kOneBit>(a, from, begin);
  for (int c = begin; c < end; c += kWarps) {
    const auto channel = next;
    if (c + kWarps < end) next = load_channel<kOneBit>(a, from, c + kWarps);  // while this one is worked on
    const Bytes codes = transpose(codes_of<kOneBit>(a, channel, lane), exchange);
    const float scale = __half2float(channel.scale), offset = channel.middle - kNumber * kStep;
    float value[8];
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      // The products in the order of the CPU kernels, so that both give the same bits.
      const float level = level_of(v < 4 ? codes.low : codes.high, v % 4, number, offset);
      value[v] = scale * level * channel.gain * row_scale[v];
    }
    store(a, channel.order * a.outputs + blockIdx.y * kTile + first, value, count);
  }
}

}  // namespace

Status dequantize(const DequantizeParams& params, cudaStream_t stream) {
  const PackedWeight& w = params.weight;
  if (w.n == 0 || w.k == 0 || params.tile_begin >= params.tile_end) return {};
  DequantizeArgs a{};
  bool one_bit = false;
  int s = 0, bits = 0;
  a.last_plane[0] = -1;
  for (int plane = 0; plane < params.grade; ++plane) {
    const int width = sub_width(w.widths.width[plane]);
    const std::int64_t size = tile_count(w.n) * w.channels[plane] * run_bytes(width);
    for (int i = 0; i < sub_count(w.widths.width[plane]); ++i) {
      bits += width;
      a.runs[s] = w.plane[plane] + i * size;
      a.channels[s] = static_cast<int>(w.channels[plane]);
      a.width[s] = width;
      a.shift[s] = kCodeBits - bits;
      ++s;
      a.last_plane[s] = plane;
      a.middle[s] = level(0, bits);
    }
    one_bit = one_bit || width == 1;
  }
  a.scale = reinterpret_cast<const __half*>(w.block_scale);
  a.row_scale = w.row_scale;
  a.gain = w.gain;
  a.order = w.channel_order;
  a.block = static_cast<int>(w.block);
  a.blocks = blocks_per_tile(a.block);
  a.k = static_cast<int>(w.k);
  a.n = w.n;
  a.tile_begin = params.tile_begin;
  a.outputs = (params.tile_end * kTile < w.n ? params.tile_end * kTile : w.n) - params.tile_begin * kTile;
  a.dtype = params.dtype;
  a.out = params.out;
  constexpr int kChannels = kWarps * kChannelsPerWarp;
  const dim3 grid(static_cast<unsigned>((w.k + kChannels - 1) / kChannels),
                  static_cast<unsigned>(params.tile_end - params.tile_begin));
  (one_bit ? dequantize_kernel<true> : dequantize_kernel<false>)<<<grid, kWarps * 32, 0, stream>>>(a);
  return launched("dequantize");
}

}  // namespace grinqh::cuda
