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
// OPERANDS  One row, planes of 2 bits: a row of the codes' operand has, of 8 channels, the codes of four matrix tiles
//   (i, i + 4, i + 8, i + 12) in a byte each, nearly as they lie in a run. A column has coefficients at one of these
//   bytes, 0 at the others:
//
//     | i lo | i hi | i + 4 lo | i + 4 hi | ... | i + 12 hi |
//
//   Otherwise (more rows would take as many more instructions that way) a row has the codes of one matrix tile, of 32
//   channels, and columns are those of rows and blocks of outputs, as here of two rows:
//
//     | b0 r0 lo | b0 r0 hi | b0 r1 lo | b0 r1 hi | b1 r0 lo | ... | b1 r1 hi |
//
//   A matrix tile meets the columns of its own block, the others being masked, so that the tiles at one place of
//   different blocks share their sums' registers.
//
// SUMS  warp: integers in registers -> block: integers in shared memory -> slice: float32 in `partial`
//   -> the last block to arrive at a tile adds the slices in their order.
//
// SPLIT  Where a thread has too few registers for a whole tile's sums, two warps share the copies of a slab, and each
//   multiplies the codes of its half of the outputs: of every 8 bytes of a run one warp's are the first 4 (layout.h).
//   They meet at a barrier of their own before every slab.
//
// TURNS  Between the tiles of a block nothing waits: a warp adds its sums to shared memory and goes on; when it is done
//   with the next tile, the other warps' sums of the one before are there, and it turns its share of those into
//   `partial`. Arrivals wait until a warp has no more tiles.
#pragma once
#include <cuda_fp16.h>

#include <bit>

#include "arrival.cuh"
#include "gemv_args.cuh"
#include "input.cuh"
#include "layout.h"
#include "plan.h"
#include "ptx.h"

namespace grinqh::cuda::detail {

constexpr float kLargest = 32600.0f;       // of a coefficient: leaves room for rounding in 16 bits
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to an integer in the low bits
constexpr std::uint32_t kIntegerBits = std::bit_cast<std::uint32_t>(kToInteger);
constexpr float kCarry = 128.0f;  // into the high byte

// Slices take chunks of 32 channels in turn, back and forth: channels near each other may be alike.
__device__ __forceinline__ int slice_chunk(int round, int slice, int slices) {
  return round * slices + (round % 2 ? slices - 1 - slice : slice);
}

// What a block keeps in shared memory; the list's length is known at launch only.
template <int kRows, int kBlocks, int kRings, int kStages>
struct Shared {
  static constexpr int kCodeBytes = kSlab * 64;
  static constexpr int kStageBytes = kCodeBytes + kSlab * kBlocks * 2;
  static constexpr int kRing = kRings * kStages * kStageBytes;
  // int [groups][sum_buffers][rows][kSumsRow]. The lanes of a warp add to different blocks and
  // rows at once: the gaps between those send them to different banks.
  static constexpr int kSums = kRing;
  static constexpr int kGap = 8;
  static constexpr int kRowGap = kRows == 1 ? 0 : (kRows == 2 ? 16 : 8);
  static constexpr int kDenseRow = kTile + kGap * kBlocks;
  static constexpr int kSumsRow = kDenseRow + (kRowGap + 32 - kDenseRow % 32) % 32;
  static_assert(kSumsRow <= kMostSumsRow);
  static __host__ __device__ constexpr int sum_of(int output) { return output + output / (kTile / kBlocks) * kGap; }
  static constexpr int kTurn = kRows * kSumsRow;
  // `sums`: buffers of all groups.
  static __host__ __device__ constexpr int entries(int sums) { return kSums + sums * kTurn * 4; }
  static __host__ __device__ constexpr int values(int sums, int capacity) { return entries(sums) + capacity * 4; }
  static __host__ __device__ constexpr int total(int sums, int capacity) {
    return values(sums, capacity) + kRows * capacity * 4;
  }
};

// The columns of the signed operands. Up to four rows share one operand of 8 columns for each block, or for
// several blocks; eight rows take two operands, `parts`, for each block.
template <int kRows, int kBlocks>
struct Columns {
  static constexpr int kParts = kRows > 4 ? 2 : 1;
  static constexpr int kPerBlock = 2 * kRows / kParts;  // columns of one block in an operand
  static constexpr int kBlocksEach = 8 / kPerBlock < kBlocks ? 8 / kPerBlock : kBlocks;
  static constexpr int kOperands = kBlocks / kBlocksEach;  // for a tile, in each part
  static constexpr int kRowsEach = kRows / kParts;
  static_assert(kPerBlock <= 8);
};

// The value of a weight's run for channels whose x is not finite: rare, so plain and slow.
template <bool kAround>
__device__ __noinline__ float nonfinite_sum(const GemvArgs& a, int slice, int row, float norm, int output) {
  float sum = 0;
  const int tile = output / kTile, in_tile = output % kTile;
  const int blocks = static_cast<int>((a.scale_bound - a.scale) / (static_cast<std::int64_t>(a.tiles) * a.k));
  for (int round = 0; round * a.slices < a.chunks; ++round) {
    const int chunk = slice_chunk(round, slice, a.slices);
    for (int c = chunk * kSlab; c < min(a.k, (chunk + 1) * kSlab); ++c) {
      const std::int64_t feature = a.order[c], at = row * a.x_stride + feature;
      float x = load_number(a.x, at, a.dtype);
      if (kAround && a.gated) {
        x = gated_silu(x, load_number(a.x, at + a.k, a.dtype), a.dtype);
      } else if (kAround && a.norm_weight) {
        x = normed(x, norm, load_number(a.norm_weight, feature, a.dtype), a.dtype);
      }
      if (isfinite(x)) continue;
      float level = 0;
      int grade = 0;
      for (int s = 0; s < a.subs && c < a.sub[s].channels; ++s) {
        const Subplane& sub = a.sub[s];
        const RunPosition at = run_position(in_tile, sub.width);
        const std::uint8_t byte = sub.runs[run_offset(tile, c, sub.channels, run_bytes(sub.width)) + at.byte];
        const int mask = (1 << sub.width) - 1;
        level += unit_weight(item(a.bits_of, s)) * (static_cast<float>(byte >> at.shift & mask) - 0.5f * mask);
        grade = item(a.grade_of, s);
      }
      if (grade == 0) continue;
      const std::int64_t scale = (static_cast<std::int64_t>(tile) * a.k + c) * blocks + in_tile / (kTile / blocks);
      sum += x * (a.gain[grade - 1] * __half2float(a.scale[scale]) * level);
    }
  }
  return sum;
}

// A subplane as a lane that copies 16 bytes of its runs needs it: in shared memory, since the parameters' constant
// memory is slow to index.
struct alignas(16) Source {
  const std::uint8_t* runs;
  std::uint32_t tile_bytes;
};

// kAround: with a transform of x or a residual. kSplit: warps that share slabs, each with its part of the outputs.
template <bool kAround, int kRows, int kBlocks, bool kOneBit, int kWarps, int kStages, int kSplit>
__global__ void __launch_bounds__(kWarps * 32, 1) gemv_kernel(const __grid_constant__ GemvArgs a) {
  using Layout = Shared<kRows, kBlocks, kWarps / kSplit, kStages>;
  static_assert(kSplit == 1 || (kSplit == 2 && kWarps / kSplit < 16));  // barriers: one for each ring and the block's
  constexpr int kMyBlocks = kBlocks / kSplit;
  constexpr bool kByBytes = kRows == 1 && !kOneBit;  // the first kind of operands
  static_assert(run_position(4 * 3 * 16, 2).byte == 6 &&
                run_position(4 * 3 * 16 + 8, 2).byte == 7);  // it relies on these
  using Column = Columns<kRows, kMyBlocks>;
  constexpr int kSubs = kOneBit ? kMaxSubplanes : 4;  // without 1-bit planes there are at most 4
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ int count[kSubs];
  __shared__ unsigned bound_bits[kRows], nonfinite;
  __shared__ float square_groups[kRows][kNormGroups], norms[kRows];  // of the rows' norms
  __shared__ Source source[kSubs][4];
  __shared__ std::uint64_t all_added[kWarps][2];  // by group and turn modulo 2: barriers of its warps

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int slice = blockIdx.x, first_row = blockIdx.z * kRows, rows = min(kRows, a.m - first_row);
  const int k_warps = 1 << a.k_warp_bits, groups = kWarps >> a.k_warp_bits;
  const int group = warp >> a.k_warp_bits, k_warp = warp & (k_warps - 1);
  const int part_of_outputs = warp % kSplit, ring = warp / kSplit;  // warps of one ring share its slabs
  const int k_ring = k_warp / kSplit, k_rings = k_warps / kSplit;   // among those of the tile
  int section = 0;
#pragma unroll
  for (int s = 1; s < kMaxSections; ++s)
    section += s < a.sections && static_cast<int>(blockIdx.y) >= a.section[s].first_column ? 1 : 0;
  const int begin_tile = a.section[section].first_tile, end_tile = a.section[section].end_tile;
  const int workers = a.section[section].columns * groups;  // groups on this slice of the section
  const int first_tile = begin_tile + (blockIdx.y - a.section[section].first_column) * groups + group;
  const int all_sums = groups * a.sum_buffers;
  int* sums = reinterpret_cast<int*>(shared + Layout::kSums) + group * a.sum_buffers * Layout::kTurn;
  int* entries = reinterpret_cast<int*>(shared + Layout::entries(all_sums));
  float* values = reinterpret_cast<float*>(shared + Layout::values(all_sums, a.capacity));
  // Before the previous kernel's results are there: all that x has no part in. Nothing here waits for what it loads.
  struct Channel {
    int index, feature;  // an index of k or more: none
    float weight;
    __half bound;
  };
  const auto read_channel = [&](int round) {
    Channel c{slice_chunk(round, slice, a.slices) * kSlab + lane, 0, 0, __half(0)};
    if (c.index < a.k) {
      c.feature = __ldg(&a.order[c.index]);
      c.weight = __ldg(&a.channel_weight[c.index]);
      c.bound = a.scale_bound[c.index];
    }
    return c;
  };
  Channel channel = read_channel(warp), next_channel = read_channel(warp + kWarps);
  // What is written before this kernel runs may be fetched to L2 all the same, if not read.
  const float* thresholds = a.thresholds + section * a.planes;
  if (warp == 0 && lane < 2) ptx::prefetch(lane ? a.gain : thresholds);
  if (kAround && a.norm_weight) {
#pragma unroll 1
    for (int i = threadIdx.x * 32; i < a.k; i += kWarps * 32 * 32)  // 64 bytes of 2, or 128 of 4 each
      ptx::prefetch(static_cast<const std::uint8_t*>(a.norm_weight) + i * (a.dtype == Dtype::f32 ? 4 : 2));
  }
  const auto prefetch_outputs = [&](int tile) {
    if (k_warp != 0 || tile >= end_tile) return;
    if (lane < kTile / 32 && tile * kTile + lane * 32 < a.n) ptx::prefetch(a.row_scale + tile * kTile + lane * 32);
    if (kAround && a.residual && lane >= 16 && lane < 16 + kTile / 32 && tile * kTile + (lane - 16) * 32 < a.n)
      ptx::prefetch(static_cast<const std::uint8_t*>(a.residual) +
                    (first_row * std::int64_t{a.n} + tile * kTile + (lane - 16) * 32) *
                        (a.dtype == Dtype::f32 ? 4 : 2));
    if (lane == kTile / 32 && a.slices > 1)
      ptx::prefetch(a.arrivals + ((blockIdx.z * a.slots + tile + section) << a.sharer_bits));
  };
  prefetch_outputs(first_tile);
#pragma unroll 1
  for (int i = 0; i < a.prefetch_slabs; ++i) {
    // Nearly every channel's first subplane will be read, so the list's slabs begin about where the chunks do.
    const int chunk = slice_chunk(k_warp + i * k_warps, slice, a.slices), index = chunk * kSlab + lane;
    if (index < a.sub[0].channels && first_tile < end_tile) {
      ptx::prefetch(a.sub[0].runs + run_offset(first_tile, index, a.sub[0].channels, a.sub[0].run));
      if (lane % (64 / kBlocks) == 0)
        ptx::prefetch(a.scale + (static_cast<std::int64_t>(first_tile) * a.k + index) * kBlocks);
    }
  }
  if (threadIdx.x < kSubs) count[threadIdx.x] = 0;
  if (threadIdx.x < kRows) bound_bits[threadIdx.x] = 0;
  if (threadIdx.x == 0) nonfinite = 0;
  if (threadIdx.x < a.subs * 4) {
    const Subplane& sub = a.sub[threadIdx.x / 4];
    source[threadIdx.x / 4][t] = {sub.runs + (t * 16 & (sub.run - 1)),
                                  static_cast<std::uint32_t>(sub.channels) * sub.run};
  }
#pragma unroll 1
  for (int i = Layout::kSums + threadIdx.x * 16; i < Layout::total(all_sums, a.capacity); i += kWarps * 32 * 16)
    *reinterpret_cast<uint4*>(shared + i) = uint4{};
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();

  // Grade the slice and list its entries: one list of channels for each subplane. Every load is issued before
  // the first result is used.
  const bool holds = lane < 16 && lane % 8 < a.subs;  // lane s: subplane s's threshold, lane 8 + s: its gain
  const float held = holds ? __ldcg(&(lane < 8 ? thresholds : a.gain)[item(a.grade_of, lane % 8) - 1]) : 0.0f;
  struct Input {  // what a channel's x is made of
    unsigned x[kRows], gated[kRows], norm;
  };
  const auto read_input = [&](const Channel& c) {
    Input input;
    const bool exists = c.index < a.sub[0].channels;
    const auto read = [&](const void* from, std::int64_t at) { return exists ? load_bits(from, at, a.dtype) : 0; };
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const std::int64_t at = (first_row + m) * a.x_stride + c.feature;
      input.x[m] = m < rows ? read(a.x, at) : 0;
      input.gated[m] = kAround && a.gated && m < rows ? read(a.x, at + a.k) : 0;  // what the gate is multiplied with
    }
    input.norm = kAround && a.norm_weight ? read(a.norm_weight, c.feature) : 0;
    return input;
  };
  float bound[kRows], factor[kRows], norm[kRows];
  // Whether registers allow it to ask for the next round's x early.
  constexpr bool kAhead = kRows < 8;
  Input next{};
  if constexpr (kAhead) next = read_input(channel);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    bound[m] = 0;
    norm[m] = 1;
    factor[m] = a.factor && m < rows ? a.factor[first_row + m] : 1.0f;
  }
  if (k_warp == 0 && lane == 0) {
    for (const std::uint64_t& barrier : all_added[group]) arrival::create(ptx::shared_address(&barrier), k_warps * 32);
  }
  if (kAround && a.norm_weight) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows) sum_squares<kWarps * 32>(a.x, (first_row + m) * a.x_stride, a.k, a.dtype, square_groups[m]);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows) norm[m] = norm_factor(square_groups[m], a.k, a.norm_eps);
      if (threadIdx.x == 0) norms[m] = norm[m];
    }
  }
  float threshold[kSubs], gain[kSubs];  // by subplane: those of one plane share its grade
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    threshold[s] = __shfl_sync(~0u, held, s);
    gain[s] = __shfl_sync(~0u, held, 8 + s);
    if (kRows == 1) threshold[s] = scaled_threshold(threshold[s], factor[0]);
  }
#pragma unroll 1
  for (int round = warp; round * a.slices < a.chunks; round += kWarps) {
    const Channel c = channel;
    const Input input = kAhead ? next : read_input(channel);
    float x[kRows];
    channel = next_channel;
    if constexpr (kAhead) next = read_input(channel);
    if constexpr (kMostSliceChunks > 2 * kWarps) next_channel = read_channel(round + 2 * kWarps);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      x[m] = to_float(input.x[m], a.dtype);
      if (kAround && a.gated) {
        x[m] = gated_silu(x[m], to_float(input.gated[m], a.dtype), a.dtype);
      } else if (kAround && a.norm_weight) {
        x[m] = normed(x[m], norm[m], to_float(input.norm, a.dtype), a.dtype);
      }
    }
    int read[kRows], most = 0;  // subplanes
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float importance = fabsf(x[m]) * c.weight;
      float chosen = 0;
      read[m] = 0;
#pragma unroll
      for (int s = 0; s < kSubs; ++s) {
        // A NaN is read in full, so that it reaches the result as in a dense product.
        const bool below = importance < (kRows == 1 ? threshold[s] : scaled_threshold(threshold[s], factor[m]));
        const bool reads = (c.index < a.sub[s].channels) & (m < rows) & !below;
        read[m] = reads ? s + 1 : read[m];
        chosen = reads ? gain[s] : chosen;
      }
      most = max(most, read[m]);
      x[m] *= chosen;
      if (!isfinite(x[m])) {
        atomicOr(&nonfinite, 1u << m);
        read[m] = 0;
        x[m] = 0;
      }
      bound[m] = fmaxf(bound[m], fabsf(x[m]) * __half2float(c.bound));
    }
    unsigned readers[kSubs];
    int base = 0;
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
      readers[s] = __ballot_sync(~0u, most > s);
      if (lane == s) base = __popc(readers[s]);
    }
    if (lane < kSubs) base = atomicAdd(&count[lane], base);
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
      const int at = a.slice_channels * s + __shfl_sync(~0u, base, s) + __popc(readers[s] & ((1u << lane) - 1));
      if (most > s) {
        entries[at] = c.index;
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          values[m * a.capacity + at] = read[m] > s ? x[m] * unit_weight(item(a.bits_of, s)) : 0.0f;
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

  // The slabs of a tile, numbered through its subplanes. A ring takes every k_rings-th, and goes on
  // counting from tile to tile, so that the rings of a group get equal shares.
  int end[kSubs], place[kSubs];  // place: a subplane, and what lies before its list apart from slabs
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    const int begin = s ? end[s - 1] : 0;
    place[s] = s << 24 | (a.slice_channels * s - begin * kSlab);
    end[s] = begin + static_cast<int>((static_cast<unsigned>(count[s]) + kSlab - 1) / kSlab);
  }
  const int slabs = end[kSubs - 1];
  struct Slab {
    int sub, at;  // at: its first entry in its list
  };
  const auto find = [&](int slab) {
    int found = place[0];
#pragma unroll
    for (int s = 1; s < kSubs; ++s) found = slab >= end[s - 1] ? place[s] : found;
    return Slab{found >> 24, slab * kSlab + (found & 0xffffff)};
  };

  // Starts the copies of this ring's next slab, or this warp's part of them: its runs and its channels' block scales.
  // Entry e of the list goes to row_of(e), so that the four channels of a lane's operand are neighbours in the list; a
  // run's 16-byte parts are swizzled so that reading them has no bank conflicts.
  const auto row_of = [](int entry) { return entry / 16 * 16 + entry % 4 * 4 + entry / 4 % 4; };  // its own inverse
  const std::uint32_t ring_at = ptx::shared_address(shared) + ring * kStages * Layout::kStageBytes,
                      entries_at = ptx::shared_address(entries), source_at = ptx::shared_address(&source[0][t]);
  constexpr int kCopied = 4 / kSplit;  // channels of four
  const int first_copied = part_of_outputs * kCopied;
  const std::uint32_t run_to =
      ptx::kept(ring_at + (row_of(4 * g) + 4 * first_copied) * 64 + (t ^ (g / 2 % 2 * 2)) * 16);
  const std::uint32_t scale_to = ptx::kept(ring_at + Layout::kCodeBytes + row_of(lane) * 2 * kBlocks);
  std::uint32_t list_at = entries_at + g * 16 + first_copied * 4;
  if constexpr (kSplit == 1) list_at = ptx::kept(list_at);  // the others have no register to spare
  int load_tile = slabs ? first_tile : end_tile, load_slab = k_ring;
  const auto load = [&](std::uint32_t stage_at) {
    Slab slab{};
    while (load_slab >= slabs && load_tile < end_tile) {
      load_slab -= slabs;
      load_tile += workers;
    }
    if (load_tile < end_tile) {
      slab = find(load_slab);
      const uint4 from = ptx::load_shared4(source_at + slab.sub * 4 * static_cast<int>(sizeof(Source)));
      const auto subplane = reinterpret_cast<const std::uint8_t*>(std::uint64_t{from.y} << 32 | from.x);
      const std::uint8_t* runs = ptx::at(subplane, load_tile, from.z);
      const std::uint8_t* scales = ptx::at(a.scale, load_tile, a.tile_scale_bytes);
      const std::uint32_t mine = ptx::load_shared(entries_at + (slab.at + lane) * 4);
      if (!kOneBit || !(a.one_bit >> slab.sub & 1)) {
        std::uint32_t channel[kCopied];
        if constexpr (kSplit == 1) {
          const uint4 channels = ptx::load_shared4(list_at + slab.at * 4);
          channel[0] = channels.x, channel[1] = channels.y, channel[2] = channels.z, channel[3] = channels.w;
        } else {
          const uint2 channels = ptx::load_shared2(list_at + slab.at * 4);
          channel[0] = channels.x, channel[1] = channels.y;
        }
#pragma unroll
        for (int i = 0; i < kCopied; ++i)
          ptx::copy_async<16>(run_to + stage_at + i * 256, ptx::at(runs, channel[i], 64));
      } else {
#pragma unroll
        for (int i = 0; i < 2 / kSplit; ++i) {
          const int row = lane / 2 + 16 * (i + part_of_outputs);
          ptx::copy_async<16>(ring_at + stage_at + row * 32 + lane % 2 * 16,
                              ptx::at(runs, ptx::load_shared(entries_at + (slab.at + row_of(row)) * 4), 32));
        }
      }
      if (kSplit == 1 || t / kCopied == part_of_outputs)
        ptx::copy_async<2 * kBlocks>(scale_to + stage_at, ptx::at(scales, mine, a.scale_bytes));
      load_slab += k_rings;
    }
    ptx::commit_copies();
    return slab;
  };
  Slab ahead[kStages - 1];  // the slabs that are being copied
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ahead[i] = load(i * Layout::kStageBytes);

  constexpr int kTilesEach = kByBytes ? 4 / Column::kOperands : 16 / kBlocks;  // matrix tiles of a block
  int sum[Column::kParts][Column::kOperands][kTilesEach][4], centre[Column::kParts][Column::kOperands];
  const auto clear = [&] {
#pragma unroll
    for (int part = 0; part < Column::kParts; ++part) {
#pragma unroll
      for (int f = 0; f < Column::kOperands; ++f) {
#pragma unroll
        for (int j = 0; j < kTilesEach; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[part][f][j][e] = 0;
        }
        centre[part][f] = 0;
      }
    }
  };
  clear();
  const int my_block = kByBytes ? g / 2 * kBlocks / 4 : g / Column::kPerBlock % Column::kBlocksEach,
            my_row = g % Column::kPerBlock / 2;
  const float first_unit = unit_weight(item(a.bits_of, 0));
  float to_integer[Column::kParts];
#pragma unroll
  for (int part = 0; part < Column::kParts; ++part) {
    const float largest = __uint_as_float(bound_bits[part * Column::kRowsEach + my_row]) * first_unit;
    to_integer[part] = largest > 1e-30f ? __fdividef(kLargest, largest) : 0.0f;
  }
  // The low byte of an integer, or the high one, rounded so that the low one is signed.
  const float to_byte = g % 2 ? kToInteger + kCarry : kToInteger;
  const std::uint32_t pick = kByBytes ? 0x4444 & ~(15 << 4 * (g / 2)) | g % 2 << 4 * (g / 2) : (g % 2 ? 0x51 : 0x40);
  const std::uint32_t my_values = ptx::kept(ptx::shared_address(values + my_row * a.capacity + t * 4));
  const std::uint32_t my_codes =
      ptx::kept(ring_at + t * 64 + ((g / 2) ^ (t / 2 * 2)) * 16 + g % 2 * 8 + part_of_outputs * 4);
  const std::uint32_t my_scales =
      ptx::kept(ring_at + Layout::kCodeBytes + (t * kBlocks + part_of_outputs * kMyBlocks + my_block) * 2);

  std::uint32_t stage_at = 0,
                free_at = (kStages - 1) * Layout::kStageBytes;  // the slab's stage; that of the one before
  // What turning sums into results takes.
  // A warp's share of a tile, in quads of outputs, rows that do not exist among them: a power of two, so that no
  // division stands between a counter and the sums that it announces.
  const int quad_bits = std::countr_zero(unsigned{kRows * kTile / 4}) - a.sharer_bits, shared_quads = 1 << quad_bits;
  const bool shares = k_warp >> a.sharer_bits == 0;
  const std::int64_t slice_stride = static_cast<std::int64_t>(a.m) * a.slots * kTile;
  const auto part_of = [&](int tile, int i) {  // the place of outputs i.. of a slice's sums
    const std::int64_t row = first_row + i / kTile;
    return (row * a.slots + tile + section) * kTile + i % kTile;
  };
  const int from_output = a.section[section].begin, to_output = a.section[section].end;
  struct Outputs {  // what the results of four outputs need besides their sums
    float scale[4];
    unsigned bias[4], residual[4];
  };
  const auto read_outputs = [&](int tile, int i) {
    Outputs outputs;
    const int output = tile * kTile + i % kTile;
    const std::int64_t place = (first_row + i / kTile) * std::int64_t{a.n} + output;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool exists = output + e >= from_output && output + e < to_output;
      outputs.scale[e] = exists ? __ldg(&a.row_scale[output + e]) : 0.0f;
      outputs.bias[e] = exists && a.bias ? load_bits(a.bias, output + e, a.dtype) : 0;
      outputs.residual[e] = kAround && exists && a.residual ? load_bits(a.residual, place + e, a.dtype) : 0;
    }
    return outputs;
  };
  const auto finish = [&](int tile, int i, const float4& sum_of_slices, const Outputs& outputs) {
    const float total[4] = {sum_of_slices.x, sum_of_slices.y, sum_of_slices.z, sum_of_slices.w};
    const int output = tile * kTile + i % kTile;
    const std::int64_t place = (first_row + i / kTile) * std::int64_t{a.n} + output;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float y = total[e] * outputs.scale[e];
      if (a.bias) y += to_float(outputs.bias[e], a.dtype);
      if (kAround && a.residual) y = rounded(y, a.dtype) + to_float(outputs.residual[e], a.dtype);
      if (output + e >= from_output && output + e < to_output) store_number(a.y, place + e, a.dtype, y);
    }
  };

  int slab = k_ring, turn = 0;
#pragma unroll 1
  for (int tile = first_tile;;) {
    const bool over = tile >= end_tile;
    if (!over) {
#pragma unroll 1
      for (; slab < slabs; slab += k_rings) {
        const Slab now = ahead[0];
        const bool is_two = !kOneBit || !(a.one_bit >> now.sub & 1);
        ptx::wait_copies<kStages - 2>();
        if constexpr (kSplit == 1) {
          __syncwarp();
        } else {
          ptx::barrier(1 + ring, kSplit * 32);
        }

        // Code bits of this lane's 8 channels.
        std::uint32_t first[2][4], second[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (kSplit == 2 && is_two) {
              first[h][i] = ptx::load_shared(my_codes + stage_at + (h * 16 + i * 4) * 64);
            } else if (is_two) {
              const uint2 v = ptx::load_shared2(my_codes + stage_at + (h * 16 + i * 4) * 64);
              first[h][i] = v.x;
              second[h][i] = v.y;
            } else {
              first[h][i] = second[h][i] = ptx::load_shared(ring_at + stage_at + (h * 16 + i * 4 + t) * 32 + g * 4);
            }
          }
        }
        // Their coefficients: one column of each operand.
        std::uint32_t coefficient[Column::kParts][Column::kOperands][kByBytes ? 8 : 2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float scale[4][Column::kOperands];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const std::uint32_t from = my_scales + stage_at + (h * 16 + i * 4) * kBlocks * 2;
            if constexpr (Column::kBlocksEach == 1 && kMyBlocks > 1) {
              // Every lane needs all of the warp's blocks of its channels: one wide load.
              std::uint32_t wide[kMyBlocks / 2];
              if constexpr (kMyBlocks == 2) {
                wide[0] = ptx::load_shared(from);
              } else if constexpr (kMyBlocks == 4) {
                *reinterpret_cast<uint2*>(wide) = ptx::load_shared2(from);
              } else {
                *reinterpret_cast<uint4*>(wide) = ptx::load_shared4(from);
              }
#pragma unroll
              for (int f = 0; f < kMyBlocks; ++f)
                scale[i][f] = __half2float(__ushort_as_half(static_cast<std::uint16_t>(wide[f / 2] >> (f % 2 * 16))));
            } else {
#pragma unroll
              for (int f = 0; f < Column::kOperands; ++f)
                scale[i][f] = __half2float(ptx::load_shared_half(from + f * (kByBytes ? 1 : Column::kBlocksEach) * 2));
            }
          }
#pragma unroll
          for (int part = 0; part < Column::kParts; ++part) {
            const uint4 v =
                ptx::load_shared4(my_values + (part * Column::kRowsEach * a.capacity + now.at + h * 16) * 4);
            const float value[4] = {__uint_as_float(v.x) * to_integer[part], __uint_as_float(v.y) * to_integer[part],
                                    __uint_as_float(v.z) * to_integer[part], __uint_as_float(v.w) * to_integer[part]};
#pragma unroll
            for (int f = 0; f < Column::kOperands; ++f) {
              std::uint32_t q[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(fmaf(value[i], scale[i][f], to_byte));
              if constexpr (kByBytes) {
#pragma unroll
                for (int i = 0; i < 4; ++i) coefficient[part][f][4 * h + i] = __byte_perm(q[i], 0, pick);
                centre[part][f] += static_cast<int>(q[0] + q[1] + (q[2] + q[3] - 4 * kIntegerBits));
              } else {
                const std::uint32_t bytes =
                    __byte_perm(__byte_perm(q[0], q[1], pick), __byte_perm(q[2], q[3], pick), 0x5410);
                centre[part][f] = __dp4a(static_cast<int>(bytes), is_two ? 0x03030303 : 0x01010101, centre[part][f]);
                coefficient[part][f][h] = bytes;
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i + 2 < kStages; ++i) ahead[i] = ahead[i + 1];
        ahead[kStages - 2] = load(free_at);

        // Each matrix tile's codes are masked in place. Masks that grow within a block save the last one: a tile's sum
        // is the difference from the one before.
        constexpr int kNested = kTilesEach < 4 ? kTilesEach : 4;
        if constexpr (kByBytes) {
#pragma unroll
          for (int c = 0; c < 8; c += 2) {
            std::uint32_t code[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const std::uint32_t low = first[c / 4][c % 4 + i], high = second[c / 4][c % 4 + i];
              code[2 * i] = __byte_perm(low, high, 0x6420);  // rows g: the four tiles of a bit position
              code[2 * i + 1] = __byte_perm(low, high, 0x7531);
            }
#pragma unroll
            for (int p = 0; p < 4; ++p) {
              const int f = p / kTilesEach;
              std::uint32_t mask = 0;
#pragma unroll
              for (int n = p - p % kNested; n <= p; ++n) mask |= 0x03030303u << (2 * n);
              ptx::mma_u8_s8(sum[0][f][p % kTilesEach], code[0] & mask, code[1] & mask, code[2] & mask, code[3] & mask,
                             coefficient[0][f][c], coefficient[0][f][c + 1]);
            }
          }
        }
        // One channel per byte.
#pragma unroll
        for (int p = 0; p < (kByBytes ? 0 : 4 / kSplit); ++p) {
          std::uint32_t code[4];  // rows g and g + 8, channels of h = 0 and of h = 1
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto& w = p >= 2 ? second[h] : first[h];
            const bool upper = is_two ? p % 2 : (kSplit == 1 ? p / 2 : part_of_outputs);  // bytes 2, 3 or 0, 1
            const std::uint32_t ab = __byte_perm(w[0], w[1], upper ? 0x7362 : 0x5140);
            const std::uint32_t cd = __byte_perm(w[2], w[3], upper ? 0x7362 : 0x5140);
            const int shift = is_two ? 0 : p % 2;
            code[2 * h] = __byte_perm(ab, cd, 0x5410) >> shift;
            code[2 * h + 1] = __byte_perm(ab, cd, 0x7632) >> shift;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int i = 4 * p + j, tile_block = i / kTilesEach;
            const int f = tile_block / Column::kBlocksEach, b = tile_block % Column::kBlocksEach;
            std::uint32_t mask = 0;
#pragma unroll
            for (int n = j - j % kNested; n <= j; ++n) mask |= (is_two ? 0x03030303u : 0x01010101u) << (2 * n);
#pragma unroll
            for (int part = 0; part < Column::kParts; ++part) {
              const std::uint32_t mine = Column::kBlocksEach == 1 || my_block == b ? ~0u : 0u;
              ptx::mma_u8_s8(sum[part][f][i % kTilesEach], code[0] & mask, code[1] & mask, code[2] & mask,
                             code[3] & mask, coefficient[part][f][0] & mine, coefficient[part][f][1] & mine);
            }
          }
        }
        free_at = stage_at;
        stage_at = stage_at == (kStages - 1) * Layout::kStageBytes ? 0 : stage_at + Layout::kStageBytes;
      }
      slab -= slabs;
    }
    if (turn > 0) arrival::wait(ptx::shared_address(&all_added[group][(turn - 1) % 2]), (turn - 1) / 2);
    if (!over) {
      // Registers -> shared memory: twice the centred sums, as integers. A lane's two columns are the
      // bytes of one row and block.
      const int pair_block = kByBytes ? t : 2 * t / Column::kPerBlock, pair_row = 2 * t % Column::kPerBlock / 2;
#pragma unroll
      for (int operand = 0; operand < Column::kParts * Column::kOperands; ++operand) {
        const int part = operand / Column::kOperands, f = operand % Column::kOperands;
        int c = centre[part][f];
        c += __shfl_xor_sync(~0u, c, 1);
        c += __shfl_xor_sync(~0u, c, 2);  // lane 4 * column + any holds the column's
        const int centred = kByBytes ? 3 * __shfl_sync(~0u, c, t * 8)
                                     : __shfl_sync(~0u, c, t * 8) + 256 * __shfl_sync(~0u, c, t * 8 + 4);
        int before[4];
#pragma unroll
        for (int j = 0; j < kTilesEach; ++j) {
          const int (&kept)[4] = sum[part][f][j];
          int whole[4];
          const bool exact = j % 4 == 0;  // not nested
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            whole[e] = exact ? kept[e] : kept[e] - before[e];
            before[e] = kept[e];
          }
          if (kByBytes || pair_block < Column::kBlocksEach) {
            const int i = kByBytes
                              ? 4 * t + f * kTilesEach + j
                              : (part_of_outputs * kMyBlocks + f * Column::kBlocksEach + pair_block) * kTilesEach + j;
            int* to = &sums[turn % 2 * Layout::kTurn + (part * Column::kRowsEach + pair_row) * Layout::kSumsRow +
                            Layout::sum_of(16 * i) + g];
            const int down = 2 * (i % 4);
            const int upper = 2 * (256 * (whole[1] >> down) + (whole[0] >> down)) - centred;
            const int lower = 2 * (256 * (whole[3] >> down) + (whole[2] >> down)) - centred;
            atomicAdd(&to[0], upper);
            atomicAdd(&to[8], lower);
          }
        }
      }
    }

    // The turn before. Shared memory -> float32 of the slice, or the result where there is one slice only; four outputs
    // a lane.
    if (turn > 0 && shares) {
      const int before = tile - workers;
#pragma unroll 1
      for (int quad = lane; quad < shared_quads; quad += 32) {
        const int i = (k_warp * shared_quads + quad) * 4, m = i / kTile;
        if (m >= rows) break;
        int4* sums_at = reinterpret_cast<int4*>(
            &sums[(turn - 1) % 2 * Layout::kTurn + m * Layout::kSumsRow + Layout::sum_of(i % kTile)]);
        const int4 whole = *sums_at;
        *sums_at = int4{};
        const float unit = __uint_as_float(bound_bits[m]) * (0.5f / kLargest * first_unit);
        float4 part{unit * whole.x, unit * whole.y, unit * whole.z, unit * whole.w};
        if (nonfinite >> m & 1) {
          const int output = before * kTile + i % kTile, row = first_row + m;
          part.x += nonfinite_sum<kAround>(a, slice, row, kAround ? norms[m] : 1.0f, output);
          part.y += nonfinite_sum<kAround>(a, slice, row, kAround ? norms[m] : 1.0f, output + 1);
          part.z += nonfinite_sum<kAround>(a, slice, row, kAround ? norms[m] : 1.0f, output + 2);
          part.w += nonfinite_sum<kAround>(a, slice, row, kAround ? norms[m] : 1.0f, output + 3);
        }
        if (a.slices > 1) {
          __stcg(reinterpret_cast<float4*>(a.partial + slice * slice_stride + part_of(before, i)), part);
        } else {
          finish(before, i, part, read_outputs(before, i));
        }
      }

      // What was stored is announced, and results are written where this slice's share was the last.
      if (a.slices > 1 && (turn % 32 == 0 || over)) {
        const int tiles = (turn - 1) % 32 + 1, first_stored = before - (tiles - 1) * workers;
        bool last = false;
        // The warp's barriers carry its stores to the counters, and the others' stores from them.
        __syncwarp();
        if (lane < tiles) {
          unsigned* arrivals =
              a.arrivals + ((blockIdx.z * a.slots + first_stored + lane * workers + section) << a.sharer_bits) + k_warp;
          last = ptx::arrive(arrivals) == static_cast<unsigned>(a.slices - 1);
          if (last) *arrivals = 0;
        }
        const unsigned lasts = __ballot_sync(~0u, last);
#pragma unroll 1
        for (int first = 0; lasts && first < tiles * shared_quads; first += 32) {
          const int quad = first + lane, of = quad >> quad_bits;
          const int done = first_stored + of * workers, i = (k_warp * shared_quads + (quad & (shared_quads - 1))) * 4;
          if (of >= tiles || !(lasts >> of & 1) || i / kTile >= rows) continue;
          const float* parts = a.partial + part_of(done, i);
          float4 total{};
          const auto add = [&](const float4& part) {
            total.x += part.x;
            total.y += part.y;
            total.z += part.z;
            total.w += part.w;
          };
          Outputs outputs;
          if constexpr (kRows == 1) {
            // A warp has one or two such sums to make and waits for each batch of loads; many rows' warps have many.
            constexpr int kBatch = kWarps == 16 && kBlocks < 8 ? 12 : 8;
            float4 part[kBatch];
            const auto ask = [&](int from) {
#pragma unroll
              for (int s = 0; s < kBatch; ++s) {
                const float* at = parts + (from + s) * slice_stride;
                part[s] = from + s < a.slices ? __ldcg(reinterpret_cast<const float4*>(at)) : float4{};
              }
            };
            ask(0);
            outputs = read_outputs(done, i);  // while the sums are on their way
#pragma unroll 1
            for (int from = 0;;) {
#pragma unroll
              for (int s = 0; s < kBatch; ++s) add(part[s]);
              from += kBatch;
              if (from >= a.slices) break;
              ask(from);
            }
          } else {
            outputs = read_outputs(done, i);
#pragma unroll kBlocks == 8 ? 4 : 8
            for (int s = 0; s < a.slices; ++s) add(__ldcg(reinterpret_cast<const float4*>(parts + s * slice_stride)));
          }
          finish(done, i, total, outputs);
        }
      }
    }
    if (over) break;
    clear();
    arrival::arrive(ptx::shared_address(&all_added[group][turn % 2]));
    ++turn;
    tile += workers;
    prefetch_outputs(tile);
  }
}

}  // namespace grinqh::cuda::detail
