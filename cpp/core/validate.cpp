#include "validate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace grinqh {
namespace {

using Long = long long;  // what printf's %lld takes

}  // namespace

Status check_shape(std::int64_t n, std::int64_t k) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (n < 1 || n > kMost) return error("n is %lld: allowed are 1 to %lld", Long{n}, Long{kMost});
  if (k < 1 || k > kMost) return error("k is %lld: allowed are 1 to %lld", Long{k}, Long{kMost});
  return {};
}

Status check_block(std::int64_t block) {
  if (!is_block(block)) return error("block is %lld: allowed are 32, 64 and 128", Long{block});
  return {};
}

Status check_widths(const PlaneWidths& widths) {
  if (widths.count < 1 || widths.count > kMaxPlanes) {
    return error("widths has %d entries: allowed are 1 to %d", widths.count, kMaxPlanes);
  }
  for (int p = 0; p < widths.count; ++p) {
    if (!is_plane_width(widths.width[p])) {
      return error("widths[%d] is %d: allowed are 1, 2, 4 and 8", p, widths.width[p]);
    }
  }
  const int sum = widths.bits(widths.count);
  if (sum > kCodeBits) return error("widths add up to %d: allowed are at most %d bits", sum, kCodeBits);
  return {};
}

Status check_channels(const PlaneWidths& widths, const std::int64_t* channels, std::int64_t k) {
  std::int64_t most = k;
  for (int p = 0; p < widths.count; ++p) {
    if (channels[p] < 0 || channels[p] > most) {
      return error("channels[%d] is %lld: allowed are 0 to %lld, a plane never stores more channels than the one above",
                   p, Long{channels[p]}, Long{most});
    }
    most = channels[p];
  }
  return {};
}

Status check_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::f16:
    case Dtype::bf16: return {};
  }
  return error("dtype is %d: allowed are float32, float16 and bfloat16", static_cast<int>(dtype));
}

Status check_features(const std::int32_t* channel_order, std::int64_t k) {
  std::uint32_t largest = 0;  // a negative feature is a large unsigned number
  for (std::int64_t c = 0; c < k; ++c) largest = std::max(largest, static_cast<std::uint32_t>(channel_order[c]));
  if (largest < static_cast<std::uint64_t>(k)) return {};
  return error("channel_order holds %d: allowed are 0 to %lld", static_cast<std::int32_t>(largest), Long{k - 1});
}

Status check_permutation(const std::int32_t* channel_order, std::int64_t k) {
  if (Status status = check_features(channel_order, k); !status.ok()) return status;
  std::vector<bool> seen(static_cast<std::size_t>(k));
  for (std::int64_t c = 0; c < k; ++c) {
    const std::int32_t j = channel_order[c];
    if (seen[static_cast<std::size_t>(j)]) {
      return error("channel_order[%lld] is %d, which occurred before: it must be a permutation", Long{c}, j);
    }
    seen[static_cast<std::size_t>(j)] = true;
  }
  return {};
}

Status check_sections(const std::int64_t* sizes, std::int64_t count, std::int64_t n) {
  if (count < 1 || count > kMaxSections) {
    return error("sections has %lld entries: allowed are at most %d", Long{count}, kMaxSections);
  }
  std::int64_t sum = 0;
  for (int s = 0; s < count; ++s) {
    if (sizes[s] < 1 || sizes[s] > n - sum) {
      return error("sections[%d] is %lld: allowed are 1 to %lld, the outputs that are left of %lld", s, Long{sizes[s]},
                   Long{n - sum}, Long{n});
    }
    sum += sizes[s];
  }
  if (sum != n) return error("sections add up to %lld: they must to n, %lld", Long{sum}, Long{n});
  return {};
}

Status check_grading(const Grading& grading, const PlaneWidths& widths, std::int64_t n) {
  const Sections& sections = grading.sections;
  if (sections.count != 1 || sections.size[0] != 0) {
    if (Status status = check_sections(sections.size, sections.count, n); !status.ok()) return status;
  }
  for (int t = 0; t < sections.count * widths.count; ++t) {
    const float value = grading.thresholds[t], least = t % widths.count ? grading.thresholds[t - 1] : 0.0f;
    if (!(value >= least)) {
      return error("thresholds[%d] is %g: allowed are numbers of at least %g, thresholds never fall and are not NaN", t,
                   static_cast<double>(value), static_cast<double>(least));
    }
  }
  if (grading.budget != nullptr && !(*grading.budget >= 0.0f)) {
    return error("budget is %g: allowed are numbers of at least 0", static_cast<double>(*grading.budget));
  }
  return {};
}

Status check_packed(const PackedWeight& weight) {
  Status status = check_shape(weight.n, weight.k);
  if (status.ok()) status = check_block(weight.block);
  if (status.ok()) status = check_widths(weight.widths);
  if (status.ok()) status = check_channels(weight.widths, weight.channels, weight.k);
  return status;
}

}  // namespace grinqh
