// Codes to canonical planes and back: each thread makes one byte of its output.
#include "convert.h"
#include "device.cuh"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void pack_kernel(const std::uint8_t* codes, std::int64_t n, std::int64_t bytes, int width, int shift,
                            std::uint8_t* plane) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= bytes) return;
  const std::int64_t row_bytes = plane_row_bytes(n, width), channel = index / row_bytes;
  const std::int64_t first = index % row_bytes * (8 / width);
  unsigned value = 0;
  for (int i = 0; i < 8 / width && first + i < n; ++i) {
    value |= (codes[channel * n + first + i] >> shift & ((1u << width) - 1)) << (i * width);
  }
  plane[index] = static_cast<std::uint8_t>(value);
}

__global__ void unpack_kernel(const UnpackParams p) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.n * p.k) return;
  const std::int64_t channel = index / p.n, at = index % p.n;
  unsigned code = 0;
  int shift = kCodeBits;
  for (int plane = 0; plane < p.widths.count && channel < p.channels[plane]; ++plane) {
    const int width = p.widths.width[plane];
    shift -= width;
    const std::uint8_t byte = p.plane[plane][channel * plane_row_bytes(p.n, width) + at * width / 8];
    code |= (byte >> (at * width % 8) & ((1u << width) - 1)) << shift;
  }
  p.codes[index] = static_cast<std::uint8_t>(code);
}

unsigned blocks_for(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

Status pack(const PackParams& params, cudaStream_t stream) {
  for (int p = 0; p < params.widths.count; ++p) {
    const int width = params.widths.width[p];
    const std::int64_t bytes = params.channels[p] * plane_row_bytes(params.n, width);
    if (bytes == 0) continue;
    pack_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(params.codes, params.n, bytes, width,
                                                            params.widths.shift(p), params.plane[p]);
  }
  return launched("pack");
}

Status unpack(const UnpackParams& params, cudaStream_t stream) {
  if (params.n == 0 || params.k == 0) return {};
  unpack_kernel<<<blocks_for(params.n * params.k), kThreads, 0, stream>>>(params);
  return launched("unpack");
}

}  // namespace grinqh::cuda
