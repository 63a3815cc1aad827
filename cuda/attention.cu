// Flash decoding (Dao et al., 2023): blocks share the positions, each with a softmax of its own, and the last block to
// arrive puts their sums together, in the blocks' order. They take turns, a step of positions each, so that a cache
// that is filled in part is work for all of them.
//
// A position's key is spread over dim / 8 lanes, which keep the same eight numbers of four query heads in registers;
// such a group of lanes goes over positions of its own, four at a time, and keeps the largest score, the sum of weights
// and the weighted values of each head. Only at the end are the groups' sums put together. Weights are powers of two:
// the scale holds log2(e).
#include <type_traits>

#include "attention.h"
#include "device.cuh"
#include "ptx.h"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = kAttentionThreads, kWarps = kThreads / 32;
constexpr int kHeads = kAttentionHeads, kRows = kAttentionRows;
constexpr float kLog2E = 1.44269504f;
constexpr float kNoScore = -1e30f;  // below any; finite, so that differences are numbers

struct Eight {
  float of[8];
};

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;

template <class T>
__device__ __forceinline__ Eight to_floats(uint4 bits) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
  Eight result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.of[2 * i] = to_float(words[i] & 0xffff, kDtype<T>);
    result.of[2 * i + 1] = to_float(words[i] >> 16, kDtype<T>);
  }
  return result;
}

// What is known of one head over some positions.
struct Sums {
  float most = kNoScore;  // the largest score
  float weight = 0;       // sum of exp2(score - most)
};

// How much each of several parts counts; `all` is what they are together.
template <int kParts>
struct Shares {
  float of[kParts];
};

template <int kParts>
__device__ __forceinline__ Shares<kParts> shares_of(const Sums (&parts)[kParts], Sums* all) {
  *all = {};
#pragma unroll
  for (int i = 0; i < kParts; ++i) all->most = fmaxf(all->most, parts[i].most);
  Shares<kParts> shares;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    shares.of[i] = exp2f(parts[i].most - all->most);
    all->weight += parts[i].weight * shares.of[i];
  }
  return shares;
}

// Sums over weights as results; zeros where there is nothing to attend to.
template <int kOutputs>
__device__ __forceinline__ void store(const AttentionParams& p, std::int64_t first, const float (&sums)[kOutputs],
                                      float weight) {
  const float factor = weight == 0 ? 0 : 1 / weight;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) store_number(p.out, first + i, p.dtype, sums[i] * factor);
}

// The positions that a group of lanes has under way.
struct Positions {
  bool attended[kRows];
  float added[kRows];
};

// What a mask says of the positions, as it was loaded: it is asked for one step ahead.
struct MaskBits {
  unsigned of[kRows];
};

template <class T>
constexpr unsigned kMinusInfinity = kDtype<T> == Dtype::f16 ? 0xfc00 : 0xff80;

template <class T>
__device__ __forceinline__ MaskBits load_mask(const AttentionParams& p, std::int64_t row, int first, int apart,
                                              int length) {
  const std::int64_t from = row * p.mask_strides.batch + first * p.mask_strides.position;
  const std::int64_t step = apart * p.mask_strides.position;
  MaskBits bits;
  if (p.mask != nullptr && p.mask_is_added) {
    const auto* numbers = static_cast<const std::uint16_t*>(p.mask) + from;
#pragma unroll
    for (int r = 0; r < kRows; ++r) bits.of[r] = first + r * apart < length ? numbers[r * step] : kMinusInfinity<T>;
  } else if (p.mask != nullptr) {
    const auto* bytes = static_cast<const std::uint8_t*>(p.mask) + from;
#pragma unroll
    for (int r = 0; r < kRows; ++r) bits.of[r] = first + r * apart < length ? bytes[r * step] : 0;
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) bits.of[r] = first + r * apart < length ? 1 : 0;
  }
  return bits;
}

template <class T>
__device__ __forceinline__ Positions to_positions(const MaskBits& bits, bool is_added) {
  Positions at;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    at.added[r] = is_added ? to_float(bits.of[r], kDtype<T>) * kLog2E : 0;
    at.attended[r] = is_added ? at.added[r] != -INFINITY : bits.of[r] != 0;
  }
  return at;
}

// Rows of the cache into shared memory, where each lane finds what it asked for. Loads into registers would be moved to
// where their values are used, so that values would wait for keys.
template <class T>
__device__ __forceinline__ void copy_rows(uint4 (&rows)[kRows][kThreads], const void* from, std::int64_t stride,
                                          int apart, const Positions& at) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    ptx::copy_async<16>(ptx::shared_address(&rows[r][threadIdx.x]), static_cast<const T*>(from) + r * apart * stride,
                        at.attended[r]);
  }
  ptx::commit_copies();
}

// Numbers that another block wrote; their address is a multiple of their size.
template <int kCount>
struct alignas(4 * kCount) Numbers {
  float of[kCount];
};
template <int kCount>
__device__ __forceinline__ Numbers<kCount> load_written(const float* from) {
  Numbers<kCount> result;
  if constexpr (kCount == 1) {
    result.of[0] = __ldcg(from);
  } else if constexpr (kCount == 2) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(from));
    result = {pair.x, pair.y};
  } else {
    static_assert(kCount == 4);
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
    result = {four.x, four.y, four.z, four.w};
  }
  return result;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) attention_kernel(const AttentionParams p) {
  constexpr int kLanes = kDim / 8, kGroups = kThreads / kLanes;
  __shared__ union {
    struct {
      uint4 keys[kRows][kThreads], values[kRows][kThreads];
    } cache;
    float sums[kWarps][kHeads][kDim];
  } shared;
  __shared__ Sums block_sums[kWarps][kHeads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, group = thread / kLanes;
  const int split = static_cast<int>(blockIdx.x);
  const std::int64_t parts = (p.group + kHeads - 1) / kHeads, row = blockIdx.z;
  const std::int64_t kv_head = blockIdx.y / parts, first_of_group = blockIdx.y % parts * kHeads;
  const std::int64_t first_head = kv_head * p.group + first_of_group;
  const int heads = static_cast<int>(p.group - first_of_group < kHeads ? p.group - first_of_group : kHeads);

  ptx::launch_dependents();
  ptx::wait_for_previous_kernel();

  uint4 query_bits[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const std::int64_t head = first_head + (h < heads ? h : 0);
    query_bits[h] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.query) + row * p.query_strides.batch +
                                                    head * p.query_strides.head + 8 * lane);
  }
  const int length = static_cast<int>(p.length), apart = p.splits * kRows * kGroups;
  const T* keys = static_cast<const T*>(p.key) + row * p.key_strides.batch + kv_head * p.key_strides.head + 8 * lane;
  const T* values =
      static_cast<const T*>(p.value) + row * p.value_strides.batch + kv_head * p.value_strides.head + 8 * lane;
  Eight query[kHeads], value[kHeads] = {};
  Sums sums[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    query[h] = to_floats<T>(query_bits[h]);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[h].of[i] *= p.scale * kLog2E;
  }
  MaskBits mask = load_mask<T>(p, row, split * kRows * kGroups + group, kGroups, length);
  for (int first = split * kRows * kGroups + group; first - group < length; first += apart) {
    const Positions at = to_positions<T>(mask, p.mask_is_added);
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) any = any || at.attended[r];
    any = __any_sync(~0u, any);
    if (any) {
      copy_rows<T>(shared.cache.keys, keys + first * p.key_strides.position, p.key_strides.position, kGroups, at);
      copy_rows<T>(shared.cache.values, values + first * p.value_strides.position, p.value_strides.position, kGroups,
                   at);
    }
    mask = load_mask<T>(p, row, first + apart, kGroups, length);
    if (!any) continue;

    ptx::wait_copies<1>();
    float score[kRows][kHeads];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Eight key = to_floats<T>(shared.cache.keys[r][thread]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(query[h].of[i], key.of[i], sum);
#pragma unroll
        for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        score[r][h] = at.attended[r] ? sum + at.added[r] : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float most = sums[h].most;
#pragma unroll
      for (int r = 0; r < kRows; ++r) most = fmaxf(most, score[r][h]);
      const float kept = exp2f(sums[h].most - most);
      sums[h] = {most, sums[h].weight * kept};
#pragma unroll
      for (int i = 0; i < 8; ++i) value[h].of[i] *= kept;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[h].weight += score[r][h] = exp2f(score[r][h] - most);
    }
    ptx::wait_copies<0>();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Eight read = to_floats<T>(shared.cache.values[r][thread]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) value[h].of[i] = fmaf(score[r][h], read.of[i], value[h].of[i]);
      }
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int apart = kLanes; apart < 32; apart *= 2) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float most = fmaxf(sums[h].most, __shfl_xor_sync(~0u, sums[h].most, apart));
      const float share = exp2f(sums[h].most - most), weight = sums[h].weight * share;
      sums[h] = {most, weight + __shfl_xor_sync(~0u, weight, apart)};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float part = value[h].of[i] * share;
        value[h].of[i] = part + __shfl_xor_sync(~0u, part, apart);
      }
    }
  }
  const int warp = thread / 32;
  __syncthreads();  // what was copied is no longer needed
  if (thread % 32 < kLanes) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(&shared.sums[warp][h][8 * lane + i]) =
            make_float4(value[h].of[i], value[h].of[i + 1], value[h].of[i + 2], value[h].of[i + 3]);
      }
      if (lane == 0) block_sums[warp][h] = sums[h];
    }
  }
  __syncthreads();

  // A thread's outputs are neighbours in one head.
  constexpr int kOutputs = kHeads * kDim / kThreads;
  const int output = thread * kOutputs, h = output / kDim;
  const bool mine = h < heads;
  float result[kOutputs] = {};
  Sums of_warps[kWarps], all;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) of_warps[w] = block_sums[w][h];
  const Shares<kWarps> shares = shares_of(of_warps, &all);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) result[i] += shares.of[w] * shared.sums[w][h][output % kDim + i];
  }
  const std::int64_t out = (row * p.kv_heads * p.group + first_head) * kDim + output;
  if (p.splits == 1) {
    if (mine) store(p, out, result, all.weight);
    return;
  }

  const std::int64_t unit = row * gridDim.y + blockIdx.y;
  float* const values_of = p.partial + unit * p.splits * kHeads * (kDim + 2);           // [splits][kHeads][kDim]
  Sums* const sums_of = reinterpret_cast<Sums*>(values_of + p.splits * kHeads * kDim);  // [splits][kHeads]
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) values_of[split * kHeads * kDim + output + i] = result[i];
  if (output % kDim == 0) sums_of[split * kHeads + h] = all;
  __shared__ bool last;
  __syncthreads();
  if (thread == 0) {
    last = ptx::arrive(p.arrivals + unit) == static_cast<unsigned>(p.splits - 1);
    if (last) p.arrivals[unit] = 0;
  }
  __syncthreads();
  if (!last || !mine) return;
  Sums of_splits[kAttentionSplits];
  Numbers<kOutputs> read[kAttentionSplits] = {};
#pragma unroll
  for (int s = 0; s < kAttentionSplits; ++s) {
    if (s >= p.splits) continue;
    const Numbers<2> sums_there = load_written<2>(reinterpret_cast<const float*>(sums_of + s * kHeads + h));
    of_splits[s] = {sums_there.of[0], sums_there.of[1]};
    read[s] = load_written<kOutputs>(values_of + s * kHeads * kDim + output);
  }
  const Shares<kAttentionSplits> shares_of_splits = shares_of(of_splits, &all);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    result[i] = 0;
#pragma unroll
    for (int s = 0; s < kAttentionSplits; ++s) result[i] += shares_of_splits.of[s] * read[s].of[i];
  }
  store(p, out, result, all.weight);
}

template <class T, int kDim>
Status launch(const AttentionParams& p, cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.splits), static_cast<unsigned>(attention_counter_count(p) / p.batch),
                        static_cast<unsigned>(p.batch));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = p.overlap ? 1 : 0;
  const cudaError_t failure = cudaLaunchKernelEx(&config, attention_kernel<T, kDim>, p);
  return failure == cudaSuccess ? Status{} : error("attention: %s", cudaGetErrorString(failure));
}

template <class T>
Status launch(const AttentionParams& p, cudaStream_t stream) {
  switch (p.dim) {
    case 64: return launch<T, 64>(p, stream);
    case 128: return launch<T, 128>(p, stream);
    default: return launch<T, 256>(p, stream);
  }
}

}  // namespace

Status attention(const AttentionParams& params, cudaStream_t stream) {
  if (!is_attention_dim(params.dim)) return error("dim is %d: allowed are 64, 128 and 256", params.dim);
  if (params.dtype == Dtype::f32) return error("dtype is float32: allowed are float16 and bfloat16");
  if (params.length > kMostPositions) {
    return error("length is %lld: allowed are at most %lld", static_cast<long long>(params.length),
                 static_cast<long long>(kMostPositions));
  }
  if (params.batch == 0 || params.kv_heads == 0 || params.group == 0) return {};
  return params.dtype == Dtype::f16 ? launch<__half>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

}  // namespace grinqh::cuda
