#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/kernels.h"
#include "grinqh/core.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

int stored_planes(const PackedWeight& weight, std::int64_t c) {
  int planes = 0;
  while (planes < weight.widths.count && weight.channels[planes] > c) ++planes;
  return planes;
}

// Asks for what a channel's outputs [begin, end) are decoded from.
void prefetch_channel(const PackedWeight& weight, std::int64_t c, int planes, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kLine = 64;
  __builtin_prefetch(weight.block_scale + c * block_count(weight.n, weight.block) + begin / weight.block);
  for (int p = 0; p < planes; ++p) {
    const int width = weight.widths.width[p];
    const std::uint8_t* row = weight.plane[p] + c * plane_row_bytes(weight.n, width);
    for (std::int64_t at = begin * width / 8; at < plane_row_bytes(end, width); at += kLine)
      __builtin_prefetch(row + at);
  }
}

}  // namespace

Status dequantize(const DequantizeParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_packed(weight);
  if (status.ok()) status = check_dtype(params.dtype);
  if (status.ok()) status = check_features(weight.channel_order, weight.k);
  if (!status.ok()) return status;
  if (params.grade < 0 || params.grade > weight.widths.count) {
    return error("grade is %d: allowed are 0 to %d", params.grade, weight.widths.count);
  }
  if (params.n_begin < 0 || params.n_begin % cpu::kTile != 0 || params.n_end < params.n_begin ||
      params.n_end > weight.n) {
    return error("outputs [%lld, %lld) are asked for: allowed are ranges inside [0, %lld) from a multiple of 128",
                 static_cast<long long>(params.n_begin), static_cast<long long>(params.n_end),
                 static_cast<long long>(weight.n));
  }
  Isa isa{};
  if (status = current_isa(isa); !status.ok()) return status;
  const cpu::Kernels kernels = cpu::kernels_for(isa);
  const std::int64_t count = params.n_end - params.n_begin;
  const std::int64_t item = params.dtype == Dtype::f32 ? 4 : 2;
  parallel_for(executor, weight.k, 64, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (std::int64_t c = begin; c < end; ++c) {
      constexpr std::int64_t kAhead = 4;
      if (const std::int64_t ahead = c + kAhead; ahead < end) {
        prefetch_channel(weight, ahead, std::min(params.grade, stored_planes(weight, ahead)), params.n_begin,
                         params.n_end);
      }
      const int grade = std::min(params.grade, stored_planes(weight, c));
      char* row = static_cast<char*>(params.out) + weight.channel_order[c] * count * item;
      if (grade == 0) {
        std::memset(row, 0, static_cast<std::size_t>(count * item));
        continue;
      }
      kernels.decode_channel(weight, c, grade, {params.n_begin, params.n_end}, values.data());
      kernels.scale_and_store(values.data(), weight.row_scale + params.n_begin, weight.gain[grade - 1], count,
                              params.dtype, row);
    }
  });
  return {};
}

}  // namespace grinqh
