// Codes to planes and back. This scalar form is the specification of the bit order in format.h.
#include <algorithm>

#include "grinqh/core.h"
#include "parallel.h"
#include "validate.h"

namespace grinqh {
namespace {

void pack_row(const std::uint8_t* codes, std::int64_t n, int width, int shift, std::uint8_t* row) {
  const unsigned mask = (1u << width) - 1u;
  const int per_byte = 8 / width;
  for (std::int64_t byte = 0; byte < plane_row_bytes(n, width); ++byte) {
    const std::int64_t first = byte * per_byte;
    const int count = static_cast<int>(std::min<std::int64_t>(per_byte, n - first));
    unsigned value = 0;
    for (int i = 0; i < count; ++i) value |= ((codes[first + i] >> shift) & mask) << (i * width);
    row[byte] = static_cast<std::uint8_t>(value);
  }
}

void unpack_row(const std::uint8_t* row, std::int64_t n, int width, int shift, std::uint8_t* codes) {
  const unsigned mask = (1u << width) - 1u;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t bit = i * width;
    const unsigned value = (row[bit / 8] >> (bit % 8)) & mask;
    codes[i] = static_cast<std::uint8_t>(codes[i] | (value << shift));
  }
}

template <typename Params>
Status check(const Params& params) {
  Status status = check_shape(params.n, params.k);
  if (status.ok()) status = check_widths(params.widths);
  if (status.ok()) status = check_channels(params.widths, params.channels, params.k);
  return status;
}

}  // namespace

Status pack(const PackParams& params, const Executor& executor) {
  if (Status status = check(params); !status.ok()) return status;
  parallel_for(executor, params.k, 64, [&](std::int64_t begin, std::int64_t end) {
    for (int p = 0; p < params.widths.count; ++p) {
      const int width = params.widths.width[p];
      for (std::int64_t c = begin; c < std::min(end, params.channels[p]); ++c) {
        pack_row(params.codes + c * params.n, params.n, width, params.widths.shift(p),
                 params.plane[p] + c * plane_row_bytes(params.n, width));
      }
    }
  });
  return {};
}

Status unpack(const UnpackParams& params, const Executor& executor) {
  if (Status status = check(params); !status.ok()) return status;
  parallel_for(executor, params.k, 64, [&](std::int64_t begin, std::int64_t end) {
    std::fill(params.codes + begin * params.n, params.codes + end * params.n, std::uint8_t{0});
    for (int p = 0; p < params.widths.count; ++p) {
      const int width = params.widths.width[p];
      for (std::int64_t c = begin; c < std::min(end, params.channels[p]); ++c) {
        unpack_row(params.plane[p] + c * plane_row_bytes(params.n, width), params.n, width, params.widths.shift(p),
                   params.codes + c * params.n);
      }
    }
  });
  return {};
}

}  // namespace grinqh
