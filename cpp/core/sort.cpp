#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "grinqh/core.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {

Status sort_channels(const SortParams& params, const Executor& executor) {
  if (Status status = check_shape(params.n, params.k); !status.ok()) return status;
  std::vector<double> importance(static_cast<std::size_t>(params.k));
  constexpr std::int64_t kColumns = 256;  // a strip of columns reads whole cache lines of each row
  parallel_for(executor, params.k, kColumns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = 0; n < params.n; ++n) {
      const float* row = params.weight + n * params.k;
      for (std::int64_t j = begin; j < end; ++j) {
        importance[static_cast<std::size_t>(j)] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
      }
    }
  });
  if (params.mean_square != nullptr) {
    for (std::int64_t j = 0; j < params.k; ++j) {
      if (!(params.mean_square[j] >= 0.0f) || std::isinf(params.mean_square[j])) {
        return error("mean_square[%lld] is %g: allowed are finite numbers of at least 0", static_cast<long long>(j),
                     static_cast<double>(params.mean_square[j]));
      }
      importance[static_cast<std::size_t>(j)] *= static_cast<double>(params.mean_square[j]);
    }
  }
  for (std::int64_t j = 0; j < params.k; ++j) {
    if (!std::isfinite(importance[static_cast<std::size_t>(j)])) {
      return error("weight has a NaN or infinite value in column %lld: allowed are finite values",
                   static_cast<long long>(j));
    }
  }
  std::iota(params.channel_order, params.channel_order + params.k, 0);
  std::stable_sort(params.channel_order, params.channel_order + params.k, [&](std::int32_t a, std::int32_t b) {
    return importance[static_cast<std::size_t>(a)] > importance[static_cast<std::size_t>(b)];
  });
  return {};
}

}  // namespace grinqh
