// y = W(grades of x) x: each block grades a slice of the channels, lists the runs of code bits that its
// rows need, and streams those runs through shared memory into integer matrix instructions.
//
// ARITHMETIC  With u_s the bits of a weight in subplane s, w = scale * gain * sum_s 2^(1 - bits_s) *
//   (u_s - (2^width_s - 1) / 2), where bits_s counts the bits down to subplane s: every subplane read
//   adds its own small, centred matrix. An entry of the list is a (channel, subplane); its coefficient
//   for row m and block b of outputs is x[m] * gain * 2^(1 - bits_s) * block_scale[b], held as a 16-bit
//   integer relative to a bound on the slice's coefficients. Its two bytes are two columns of the
//   signed matrix operand, the masked code bits the unsigned one, and all sums are exact integers:
//   they depend neither on the order of the list nor on the other rows' channels.
//
//   columns of one operand, 4 blocks of 64 outputs, one row:   | b0 lo | b0 hi | b1 lo | ... | b3 hi |
//   Every column meets every output; a lane keeps the outputs that lie in its column's block.
//
// SUMS  warp: integers in registers -> block: integers in shared memory -> slice: float32 in `partial`
//   -> the last block to arrive at a tile adds the slices in their order.
#include <cuda_fp16.h>

#include <climits>

#include "device.cuh"
#include "kernels.h"
#include "layout.h"
#include "ptx.h"

namespace grinqh::cuda {
namespace {

constexpr float kLargest = 32600.0f;        // of a coefficient: leaves room for rounding in 16 bits
constexpr float kToInteger = 12582912.0f;   // 1.5 * 2^23: adding it rounds a float to an integer in the low bits
constexpr float kCarry = 128.0f;            // makes the low byte signed
constexpr std::uint32_t kPadding = 0xffffffffu;
constexpr int kSubplaneShift = 28;          // entry: subplane << 28 | channel
constexpr std::uint32_t kChannelMask = (1u << kSubplaneShift) - 1;

struct Subplane {
  const std::uint8_t* runs;  // [tiles][channels][run]
  int channels;
  int width;     // 1 or 2
  int grade;     // the lowest grade that reads it
  float weight;  // 2^(1 - bits)
};

struct GemvArgs {
  const void* x;
  std::int64_t x_stride;
  const __half* scale;  // [tiles][k][blocks]
  const __half* scale_bound;  // [k]
  const float* row_scale;
  const float* gain;
  const std::int32_t* order;
  const float* channel_weight;
  const float* thresholds;
  const float* factor;
  const void* bias;
  void* y;
  float* partial;
  unsigned* arrivals;
  Subplane sub[kMaxSubplanes];
  int subs, planes;
  int twos;  // subplanes of 2 bits
  Dtype dtype;
  int m, n, k, tiles;
  int slices, k_warps, columns;
  int slice_channels;  // at most, in one slice
  int capacity;        // entries
};

// Channels are sorted by importance, so slices take chunks of 32 in turn, back and forth.
__device__ __forceinline__ int slice_chunk(int round, int slice, int slices) {
  return round * slices + (round % 2 ? slices - 1 - slice : slice);
}

// What a block keeps in shared memory; the list's length is known at launch only.
template <int kRows, int kBlocks, int kWarps, int kStages>
struct Shared {
  static constexpr int kCodeBytes = kSlab * 64;
  static constexpr int kStageBytes = kCodeBytes + kSlab * kBlocks * 2;
  static constexpr int kRing = kWarps * kStages * kStageBytes;
  static constexpr int kSums = kRing;  // int [groups][rows][tile]
  static __host__ __device__ int entries(int groups) { return kSums + groups * kRows * kTile * 4; }
  static __host__ __device__ int values(int groups, int capacity) { return entries(groups) + capacity * 4; }
  static __host__ __device__ int total(int groups, int capacity) {
    return values(groups, capacity) + kRows * capacity * 4;
  }
};

// Byte transpose: out[b] holds byte b of w[0..3].
__device__ __forceinline__ void transpose(const std::uint32_t (&w)[4], std::uint32_t (&out)[4]) {
  const std::uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
  const std::uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
  out[0] = __byte_perm(a, b, 0x5410);
  out[1] = __byte_perm(a, b, 0x7632);
  out[2] = __byte_perm(c, d, 0x5410);
  out[3] = __byte_perm(c, d, 0x7632);
}

template <int kRows, int kBlocks>
struct Columns {
  static constexpr int kPerBlock = 2 * kRows;                                 // columns of one block of outputs
  static constexpr int kBlocksEach = kPerBlock >= 8 ? 1 : (8 / kPerBlock < kBlocks ? 8 / kPerBlock : kBlocks);
  static constexpr int kOperands = kBlocks / kBlocksEach;                     // operands for a tile
  static_assert(kPerBlock <= 8);
};

// The value of a weight's run for channels whose x is not finite: rare, so plain and slow.
__device__ __noinline__ float nonfinite_sum(const GemvArgs& a, int slice, int row, int output) {
  float sum = 0;
  const int tile = output / kTile, in_tile = output % kTile;
  const int blocks = static_cast<int>((a.scale_bound - a.scale) / (static_cast<std::int64_t>(a.tiles) * a.k));
  const int chunks = (a.k + kSlab - 1) / kSlab;
  for (int round = 0; round * a.slices < chunks; ++round) {
    const int chunk = slice_chunk(round, slice, a.slices);
    for (int c = chunk * kSlab; c < min(a.k, (chunk + 1) * kSlab); ++c) {
      const float x = load_number(a.x, row * a.x_stride + a.order[c], a.dtype);
      if (isfinite(x)) continue;
      float level = 0;
      int grade = 0;
      for (int s = 0; s < a.subs && c < a.sub[s].channels; ++s) {
        const Subplane& sub = a.sub[s];
        const RunPosition at = run_position(in_tile, sub.width);
        const std::uint8_t byte =
            sub.runs[(static_cast<std::int64_t>(tile) * sub.channels + c) * run_bytes(sub.width) + at.byte];
        const int mask = (1 << sub.width) - 1;
        level += sub.weight * (static_cast<float>(byte >> at.shift & mask) - 0.5f * mask);
        grade = sub.grade;
      }
      if (grade == 0) continue;
      const std::int64_t scale = (static_cast<std::int64_t>(tile) * a.k + c) * blocks + in_tile / (kTile / blocks);
      sum += x * (a.gain[grade - 1] * __half2float(a.scale[scale]) * level);
    }
  }
  return sum;
}

template <int kRows, int kBlocks, bool kOneBit, int kWarps, int kStages, int kResident>
__global__ void __launch_bounds__(kWarps * 32, kResident) gemv_kernel(const __grid_constant__ GemvArgs a) {
  using Layout = Shared<kRows, kBlocks, kWarps, kStages>;
  using Column = Columns<kRows, kBlocks>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ unsigned count_two, count_one, bound_bits[kRows], nonfinite;
  __shared__ unsigned long long run_base[kWarps][kMaxSubplanes];
  __shared__ unsigned last_arrival[kWarps];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int slice = blockIdx.x % a.slices, column = blockIdx.x / a.slices;
  const int first_row = blockIdx.y * kRows, rows = min(kRows, a.m - first_row);
  const int groups = kWarps / a.k_warps;
  const int group = warp / a.k_warps, k_warp = warp % a.k_warps, group_threads = a.k_warps * 32;
  int* sums = reinterpret_cast<int*>(shared + Layout::kSums) + group * kRows * kTile;
  std::uint32_t* entries = reinterpret_cast<std::uint32_t*>(shared + Layout::entries(groups));
  float* values = reinterpret_cast<float*>(shared + Layout::values(groups, a.capacity));
  const int ones_at = (a.slice_channels * a.twos + kSlab - 1) / kSlab * kSlab;  // where the 1-bit list begins

  const auto meet = [&] {  // the warps that share a tile
    if (a.k_warps == 1) {
      __syncwarp();
    } else {
      ptx::barrier(1 + group, group_threads);
    }
  };

  ptx::launch_dependents();
  if (threadIdx.x < kRows) bound_bits[threadIdx.x] = 0;
  if (threadIdx.x == 0) count_two = count_one = nonfinite = 0;
  for (int i = threadIdx.x; i < groups * kRows * kTile; i += kWarps * 32)
    reinterpret_cast<int*>(shared + Layout::kSums)[i] = 0;
  __syncthreads();
  ptx::wait_for_previous_kernel();

  // Grade the slice and list its entries.
  const int chunks = (a.k + kSlab - 1) / kSlab;
  float bound[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) bound[m] = 0;
  for (int round = warp;; round += kWarps) {
    if (round * a.slices >= chunks) break;
    const int c = slice_chunk(round, slice, a.slices) * kSlab + lane;
    int top = 0, grade[kRows], stored = 0;
    float value[kRows];
    if (c < a.k) {
      const int feature = a.order[c];
      const float weight = a.channel_weight[c], scale = __half2float(a.scale_bound[c]);
      for (int s = 0; s < a.subs; ++s) {
        if (c < a.sub[s].channels) stored = a.sub[s].grade;
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        grade[m] = 0;
        if (m >= rows) continue;
        const float x = load_number(a.x, (first_row + m) * a.x_stride + feature, a.dtype);
        const float factor = a.factor ? a.factor[first_row + m] : 1.0f;
        grade[m] = grade_of(x, weight, a.thresholds, factor, a.planes, stored);
        if (!isfinite(x)) {
          atomicOr(&nonfinite, 1u << m);
          grade[m] = 0;
        }
        if (grade[m] > 0) {
          value[m] = x * a.gain[grade[m] - 1];
          bound[m] = fmaxf(bound[m], fabsf(value[m]) * scale);
        }
        top = max(top, grade[m]);
      }
    }
    int two = 0, one = 0;
    for (int s = 0; s < a.subs; ++s) {
      if (a.sub[s].grade <= top) (a.sub[s].width == 2 ? two : one) += 1;
    }
    int two_at = two, one_at = one;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int v = __shfl_up_sync(~0u, two_at, d);
      if (lane >= d) two_at += v;
      if constexpr (kOneBit) {
        const int u = __shfl_up_sync(~0u, one_at, d);
        if (lane >= d) one_at += u;
      }
    }
    int two_base = 0, one_base = 0;
    if (lane == 31) {
      two_base = atomicAdd(&count_two, two_at);
      if constexpr (kOneBit) one_base = atomicAdd(&count_one, one_at);
    }
    two_at += __shfl_sync(~0u, two_base, 31) - two;
    if constexpr (kOneBit) one_at += ones_at + __shfl_sync(~0u, one_base, 31) - one;
    for (int s = 0; s < a.subs && a.sub[s].grade <= top; ++s) {
      const int at = !kOneBit || a.sub[s].width == 2 ? two_at++ : one_at++;
      // Physical row r of a slab is operand row 16 * (r / 16) + 4 * (r % 4) + r / 4 % 4.
      const int value_at = (at & ~15) + at % 4 * 4 + at / 4 % 4;
      entries[at] = static_cast<std::uint32_t>(s) << kSubplaneShift | c;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        values[m * a.capacity + value_at] = grade[m] >= a.sub[s].grade ? value[m] * a.sub[s].weight : 0.0f;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    // Non-negative floats compare as their bits do.
    const unsigned largest = __reduce_max_sync(~0u, __float_as_uint(bound[m]));
    if (lane == 0) atomicMax(&bound_bits[m], largest);
  }
  __syncthreads();

  // Scale the coefficients to integers' range and pad both lists to whole slabs.
  const int slabs_two = (count_two + kSlab - 1) / kSlab, slabs_one = kOneBit ? (count_one + kSlab - 1) / kSlab : 0;
  const int slabs = slabs_two + slabs_one;
  float unit[kRows];  // of an integer coefficient
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const float largest = __uint_as_float(bound_bits[m]) * a.sub[0].weight;
    const float to_integer = largest > 1e-30f ? kLargest / largest : 0.0f;
    unit[m] = largest / kLargest;
    for (int i = threadIdx.x; i < slabs * kSlab; i += kWarps * 32) {
      const bool is_two = i < slabs_two * kSlab;
      const int at = is_two ? i : ones_at + i - slabs_two * kSlab;
      const int value_at = (at & ~15) + at % 4 * 4 + at / 4 % 4;
      const bool used = is_two ? at < count_two : at - ones_at < count_one;
      if (!used) entries[at] = kPadding;
      float& value = values[m * a.capacity + value_at];
      value = used ? value * to_integer : 0.0f;
    }
  }
  __syncthreads();

  // This warp's slabs: every k_warps-th of the tiles' slabs, one after the other.
  const int tile_step = a.columns * groups, first_tile = column + group * a.columns;
  std::uint8_t* ring = shared + warp * kStages * Layout::kStageBytes;
  const std::uint32_t ring_address = ptx::shared_address(ring);

  int load_tile = first_tile, load_slab = k_warp;
  auto set_bases = [&] {
    while (load_slab >= slabs && load_tile < a.tiles) {
      load_slab -= slabs;
      load_tile += tile_step;
      if (slabs == 0) load_tile = a.tiles;
    }
    __syncwarp();
    if (lane < a.subs && load_tile < a.tiles) {
      const Subplane& sub = a.sub[lane];
      run_base[warp][lane] = reinterpret_cast<unsigned long long>(sub.runs) +
                             static_cast<std::int64_t>(load_tile) * sub.channels * run_bytes(sub.width);
    }
    __syncwarp();
  };
  set_bases();
  auto load = [&](int stage) {
    if (load_tile < a.tiles) {
      const bool is_two = !kOneBit || load_slab < slabs_two;
      const std::uint32_t* list = entries + (is_two ? load_slab * kSlab : ones_at + (load_slab - slabs_two) * kSlab);
      const std::uint32_t to = ring_address + stage * Layout::kStageBytes;
      if (is_two) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = lane / 4 + 8 * i;
          const std::uint32_t entry = list[r];
          const std::uint8_t* from = reinterpret_cast<const std::uint8_t*>(run_base[warp][entry >> kSubplaneShift & 7]) +
                                     static_cast<std::uint64_t>(entry & kChannelMask) * 64 + t * 16;
          if (entry != kPadding) ptx::copy_async<16>(to + r * 64 + ((t ^ (r / 2 % 2 * 2)) * 16), from);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = lane / 2 + 16 * i;
          const std::uint32_t entry = list[r];
          const std::uint8_t* from = reinterpret_cast<const std::uint8_t*>(run_base[warp][entry >> kSubplaneShift & 7]) +
                                     static_cast<std::uint64_t>(entry & kChannelMask) * 32 + lane % 2 * 16;
          if (entry != kPadding) ptx::copy_async<16>(to + r * 32 + lane % 2 * 16, from);
        }
      }
      const std::uint32_t entry = list[lane];
      const bool used = entry != kPadding;
      const __half* from =
          a.scale + (static_cast<std::int64_t>(load_tile) * a.k + (used ? entry & kChannelMask : 0)) * kBlocks;
      ptx::copy_async<2 * kBlocks>(to + Layout::kCodeBytes + lane * 2 * kBlocks, from, used);
      load_slab += a.k_warps;
      if (load_slab >= slabs) set_bases();
    }
    ptx::commit_copies();
  };

  int sum[16][4];
  int centre[Column::kOperands];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
#pragma unroll
    for (int f = 0; f < Column::kOperands; ++f) centre[f] = 0;
  };
  clear();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  const int my_block = g / Column::kPerBlock % Column::kBlocksEach, my_row = g % Column::kPerBlock / 2;
  const bool high_byte = g % 2;
  const std::uint32_t pick = high_byte ? 0x51 : 0x40, flip = high_byte ? 0 : 0x80808080u;

  int slab = k_warp, stage = 0;
  for (int tile = first_tile; tile < a.tiles; tile += tile_step) {
    for (; slab < slabs; slab += a.k_warps) {
      ptx::wait_copies<kStages - 2>();
      __syncwarp();
      const bool is_two = !kOneBit || slab < slabs_two;
      const std::uint32_t from = ring_address + stage * Layout::kStageBytes;
      const int value_at = is_two ? slab * kSlab : ones_at + (slab - slabs_two) * kSlab;

      // Code bits of this lane's 8 channels, transposed to one channel per byte.
      std::uint32_t low[8], high[8];
      const std::uint32_t swizzled = ((g / 2) ^ (t / 2 * 2)) * 16 + g % 2 * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        std::uint32_t first[4], second[4], out[4];
        auto& to = h ? high : low;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = h * 16 + i * 4 + t;
          if (is_two) {
            const uint2 v = ptx::load_shared_8(from + r * 64 + swizzled);
            first[i] = v.x;
            second[i] = v.y;
          } else {
            first[i] = ptx::load_shared_4(from + r * 32 + g * 4);
          }
        }
        transpose(first, out);
        if (is_two) {
          to[0] = out[0], to[1] = out[1], to[2] = out[2], to[3] = out[3];
          transpose(second, out);
          to[4] = out[0], to[5] = out[1], to[6] = out[2], to[7] = out[3];
        } else {
          // Two matrix tiles of rows share a byte pair: the odd bits' come second.
          to[0] = out[0], to[1] = out[1], to[2] = out[0] >> 1, to[3] = out[1] >> 1;
          to[4] = out[2], to[5] = out[3], to[6] = out[2] >> 1, to[7] = out[3] >> 1;
        }
      }

      // Coefficients: one column of each operand for this lane's 8 channels.
      std::uint32_t coefficient[Column::kOperands][2];
      const __half* scale = reinterpret_cast<const __half*>(ring + stage * Layout::kStageBytes + Layout::kCodeBytes);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 v = *reinterpret_cast<const float4*>(values + my_row * a.capacity + value_at + h * 16 + t * 4);
        const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int f = 0; f < Column::kOperands; ++f) {
          std::uint32_t q[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float s = __half2float(scale[(h * 16 + i * 4 + t) * kBlocks + f * Column::kBlocksEach + my_block]);
            q[i] = __float_as_uint(fmaf(value[i], s, kToInteger + kCarry));
          }
          coefficient[f][h] =
              __byte_perm(__byte_perm(q[0], q[1], pick), __byte_perm(q[2], q[3], pick), 0x5410) ^ flip;
          centre[f] = __dp4a(static_cast<int>(coefficient[f][h]), is_two ? 0x03030303 : 0x01010101, centre[f]);
        }
      }
      __syncwarp();
      load(stage == 0 ? kStages - 1 : stage - 1);

      const std::uint32_t mask = is_two ? 0x03030303u : 0x01010101u;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int p = i / 4 * 2, f = i / (16 / kBlocks) / Column::kBlocksEach;
        const std::uint32_t bits = mask << (2 * (i % 4));
        ptx::mma_u8_s8(sum[i], low[p] & bits, low[p + 1] & bits, high[p] & bits, high[p + 1] & bits,
                       coefficient[f][0], coefficient[f][1]);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    slab -= slabs;
    if (slabs == 0) slab = 0;

    // Registers -> shared memory: twice the centred sums, as integers.
    int centred[Column::kOperands];
#pragma unroll
    for (int f = 0; f < Column::kOperands; ++f) {
      int c = centre[f];
      c += __shfl_xor_sync(~0u, c, 1);
      c += __shfl_xor_sync(~0u, c, 2);  // lane 4 * column + any holds the column's
      centred[f] = __shfl_sync(~0u, c, t * 8) + 256 * __shfl_sync(~0u, c, t * 8 + 4);
    }
    const int pair_block = 2 * t / Column::kPerBlock, pair_row = 2 * t % Column::kPerBlock / 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int block = i / (16 / kBlocks), f = block / Column::kBlocksEach;
      if (pair_block == block % Column::kBlocksEach) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int lo = sum[i][2 * half] >> (2 * (i % 4)), hi = sum[i][2 * half + 1] >> (2 * (i % 4));
          atomicAdd(&sums[pair_row * kTile + 16 * i + 8 * half + g], 2 * (256 * hi + lo) - centred[f]);
        }
      }
    }
    clear();
    meet();

    // Shared memory -> float32 of the slice, or the result where there is one slice only.
    const int thread = threadIdx.x % group_threads, outputs = min(kTile, a.n - tile * kTile);
    const std::int64_t row_stride = static_cast<std::int64_t>(a.tiles) * kTile;
    for (int i = thread; i < kTile; i += group_threads) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int whole = sums[m * kTile + i];
        sums[m * kTile + i] = 0;
        if (m >= rows || i >= outputs) continue;
        const int output = tile * kTile + i, row = first_row + m;
        float part = 0.5f * unit[m] * static_cast<float>(whole);
        if (nonfinite >> m & 1) part += nonfinite_sum(a, slice, row, output);
        if (a.slices > 1) {
          __stcg(&a.partial[(static_cast<std::int64_t>(slice) * a.m + row) * row_stride + output], part);
        } else {
          float y = part * a.row_scale[output];
          if (a.bias) y += load_number(a.bias, output, a.dtype);
          store_number(a.y, static_cast<std::int64_t>(row) * a.n + output, a.dtype, y);
        }
      }
    }
    if (a.slices > 1) {
      __threadfence();
      meet();
      unsigned* arrivals = a.arrivals + blockIdx.y * a.tiles + tile;
      if (thread == 0) last_arrival[group] = atomicAdd(arrivals, 1) == static_cast<unsigned>(a.slices - 1);
      meet();
      if (last_arrival[group]) {
        __threadfence();
        for (int i = thread; i < outputs; i += group_threads) {
          const int output = tile * kTile + i;
          const float row_scale = a.row_scale[output];
          for (int m = 0; m < rows; ++m) {
            const float* parts = a.partial + (first_row + m) * row_stride + output;
            float total = 0;
            for (int s = 0; s < a.slices; ++s) total += __ldcg(parts + s * a.m * row_stride);
            float y = total * row_scale;
            if (a.bias) y += load_number(a.bias, output, a.dtype);
            store_number(a.y, static_cast<std::int64_t>(first_row + m) * a.n + output, a.dtype, y);
          }
        }
        if (thread == 0) *arrivals = 0;
      }
    }
    meet();
  }
}

template <int kRows, int kBlocks, bool kOneBit, int kWarps, int kStages, int kResident>
Status launch(const GemvArgs& a, cudaStream_t stream) {
  const auto kernel = gemv_kernel<kRows, kBlocks, kOneBit, kWarps, kStages, kResident>;
  const int bytes = Shared<kRows, kBlocks, kWarps, kStages>::total(kWarps / a.k_warps, a.capacity);
  // Per device and cheap; a block may use more than 48 KB only after this.
  cudaError_t failure = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (failure == cudaSuccess) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(a.slices * a.columns, (a.m + kRows - 1) / kRows);
    config.blockDim = dim3(kWarps * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = GRINQH_PDL;
    failure = cudaLaunchKernelEx(&config, kernel, a);
  }
  if (failure != cudaSuccess) return error("grinqh gemv: %s", cudaGetErrorString(failure));
  return {};
}

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
  a.y = p.y;
  a.partial = p.partial;
  a.arrivals = p.arrivals;
  a.planes = w.widths.count;
  a.dtype = p.dtype;
  a.m = static_cast<int>(p.m);
  a.n = static_cast<int>(w.n);
  a.k = static_cast<int>(w.k);
  a.tiles = static_cast<int>(tile_count(w.n));
  int bits = 0, ones = 0;
  for (int plane = 0; plane < w.widths.count; ++plane) {
    const int width = sub_width(w.widths.width[plane]);
    const std::int64_t size = a.tiles * w.channels[plane] * run_bytes(width);
    for (int i = 0; i < sub_count(w.widths.width[plane]); ++i) {
      bits += width;
      (width == 2 ? a.twos : ones) += 1;
      a.sub[a.subs++] = {w.plane[plane] + i * size, static_cast<int>(w.channels[plane]), width, plane + 1,
                         1.0f / static_cast<float>(1 << (bits - 1))};
    }
  }
  a.slices = p.plan.slices;
  a.k_warps = p.plan.k_warps;
  a.columns = p.plan.columns;
  const int chunks = (a.k + kSlab - 1) / kSlab;
  a.slice_channels = (chunks + a.slices - 1) / a.slices * kSlab;
  const auto whole_slabs = [](int count) { return (count + kSlab - 1) / kSlab * kSlab; };
  a.capacity = whole_slabs(a.slice_channels * a.twos) + whole_slabs(a.slice_channels * ones);
  return a;
}
}  // namespace
}  // namespace grinqh::cuda
