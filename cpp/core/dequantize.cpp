#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "grinqh/core.h"
#include "half.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

int stored_planes(const PackedWeight& weight, std::int64_t c) {
  int planes = 0;
  while (planes < weight.widths.count && weight.channels[planes] > c) ++planes;
  return planes;
}

}  // namespace

Status dequantize(const DequantizeParams& params, const Executor& executor) {
  const PackedWeight& weight = params.weight;
  Status status = check_packed(weight);
  if (status.ok()) status = check_dtype(params.dtype);
  if (!status.ok()) return status;
  if (params.grade < 0 || params.grade > weight.widths.count) {
    return error("grade is %d: allowed are 0 to %d", params.grade, weight.widths.count);
  }
  if (params.n_begin < 0 || params.n_end < params.n_begin || params.n_end > weight.n) {
    return error("outputs [%lld, %lld) are asked for: allowed are ranges inside [0, %lld)",
                 static_cast<long long>(params.n_begin), static_cast<long long>(params.n_end),
                 static_cast<long long>(weight.n));
  }
  const cpu::Kernels kernels = cpu::kernels_for(current_isa());
  const std::int64_t count = params.n_end - params.n_begin;
  parallel_for(executor, weight.k, 64, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (std::int64_t c = begin; c < end; ++c) {
      const int grade = std::min(params.grade, stored_planes(weight, c));
      const std::int64_t row = weight.channel_order[c] * count;
      if (grade == 0) {
        for (std::int64_t i = 0; i < count; ++i) store_float(params.out, row + i, params.dtype, 0.0f);
        continue;
      }
      kernels.decode_channel(weight, c, grade, {params.n_begin, params.n_end}, values.data());
      const float gain = weight.gain[grade - 1];
      for (std::int64_t i = 0; i < count; ++i) {
        const float value = values[static_cast<std::size_t>(i)] * gain * weight.row_scale[params.n_begin + i];
        store_float(params.out, row + i, params.dtype, value);
      }
    }
  });
  return {};
}

}  // namespace grinqh
