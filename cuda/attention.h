// Attention of one new token over a cache of keys and values, beside the packed layers of a decode step.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "grinqh/types.h"

namespace grinqh::cuda {

inline constexpr int kAttentionThreads = 256;
inline constexpr int kAttentionHeads = 4;  // query heads of a block
inline constexpr int kAttentionRows = 4;   // positions that a lane has under way

inline constexpr int kAttentionSplits = 16;  // blocks that share a head's positions, at most

inline constexpr std::int64_t kMostPositions = std::int64_t{1} << 30;

// Numbers of a head that the kernels are compiled for: eight to a lane, a power of two of lanes.
constexpr bool is_attention_dim(std::int64_t dim) { return dim == 64 || dim == 128 || dim == 256; }

// Positions that a block takes at once.
constexpr std::int64_t attention_step(int dim) { return kAttentionRows * kAttentionThreads / (dim / 8); }

// Blocks that share the positions of a cache. Their number depends on nothing else, so neither do a row's sums.
constexpr int attention_splits(std::int64_t length, int dim) {
  const std::int64_t steps = (length + attention_step(dim) - 1) / attention_step(dim);
  return static_cast<int>(std::clamp<std::int64_t>(steps, 1, kAttentionSplits));
}

// out[b][h] = softmax(scale * query[b][h] . key[b][h / group] + mask[b]) value[b][h / group]. Positions that may not be
// attended to are not read; a row without any gives zeros.
struct AttentionParams {
  const void *query, *key, *value;  // [batch][kv_heads * group][dim], and twice [batch][kv_heads][length][dim]
  const void* mask;                 // [batch][length]: bytes that are not 0 where to attend, or numbers to add; or null
  bool mask_is_added;
  Dtype dtype;  // float16 or bfloat16: of all but a mask of bytes
  std::int64_t batch, kv_heads, group, length;
  int dim;
  struct Strides {  // in elements: multiples of 8 but of the mask, as addresses are multiples of 16 bytes
    std::int64_t batch, head, position;
  };
  Strides query_strides, key_strides, value_strides, mask_strides;
  float scale;
  void* out;           // [batch][kv_heads * group][dim], contiguous
  int splits;          // of attention_splits
  bool overlap;        // as of GemvParams
  float* partial;      // workspace of attention_partial_count floats
  unsigned* arrivals;  // workspace of attention_counter_count zeros; left zero (counters.h)
};

// Groups of at most kAttentionHeads query heads, each over one key head of one row.
constexpr std::int64_t attention_counter_count(const AttentionParams& p) {
  return p.batch * p.kv_heads * ((p.group + kAttentionHeads - 1) / kAttentionHeads);
}

// For each block its sums, and the largest score and sum of weights of each head.
constexpr std::int64_t attention_partial_count(const AttentionParams& p) {
  return p.splits == 1 ? 0 : attention_counter_count(p) * p.splits * kAttentionHeads * (p.dim + 2);
}

Status attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace grinqh::cuda
