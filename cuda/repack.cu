// Canonical order (format.h) to tile order (layout.h) and back. Each thread makes one byte or scale of
// its output, so both directions are plain gathers.
#include <cuda_fp16.h>

#include "device.cuh"
#include "kernels.h"
#include "layout.h"

namespace grinqh::cuda {
namespace {

constexpr int kThreads = 256;

// Bits [shift, shift + width) of output n's code, as the canonical row holds them.
__device__ unsigned canonical_bits(const std::uint8_t* row, std::int64_t n, int width, int shift, int bits) {
  const std::int64_t bit = n * width;
  return row[bit / 8] >> (bit % 8 + shift) & ((1u << bits) - 1);
}

__global__ void repack_plane_kernel(const std::uint8_t* plane, std::int64_t n, std::int64_t channels, int width,
                                    std::uint8_t* out) {
  const int sub = sub_width(width), run = run_bytes(sub);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t tiles = tile_count(n);
  if (index >= sub_count(width) * tiles * channels * run) return;
  const int byte = static_cast<int>(index % run);
  const std::int64_t channel = index / run % channels, tile = index / run / channels % tiles;
  const int part = static_cast<int>(index / run / channels / tiles);  // 0: the most significant subplane
  const std::uint8_t* codes = plane + channel * plane_row_bytes(n, width);
  unsigned packed = 0;
  for (int shift = 0; shift < 8; shift += sub) {
    const std::int64_t output = tile * kTile + run_output(byte, shift, sub);
    if (output < n) packed |= canonical_bits(codes, output, width, width - (part + 1) * sub, sub) << shift;
  }
  out[index] = static_cast<std::uint8_t>(packed);
}

__global__ void unpack_plane_kernel(const std::uint8_t* tiles, std::int64_t n, std::int64_t channels, int width,
                                    std::uint8_t* out) {
  const int sub = sub_width(width), run = run_bytes(sub);
  const std::int64_t row_bytes = plane_row_bytes(n, width);
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= row_bytes * channels) return;
  const std::int64_t channel = index / row_bytes;
  unsigned packed = 0;
  for (int bit = 0; bit < 8; bit += width) {
    const std::int64_t output = (index % row_bytes * 8 + bit) / width;
    if (output >= n) continue;
    const RunPosition at = run_position(static_cast<int>(output % kTile), sub);
    for (int part = 0; part < sub_count(width); ++part) {
      const std::int64_t from =
          part * tile_count(n) * channels * run + run_offset(output / kTile, channel, channels, run) + at.byte;
      packed |= (tiles[from] >> at.shift & ((1u << sub) - 1)) << (bit + width - (part + 1) * sub);
    }
  }
  out[index] = static_cast<std::uint8_t>(packed);
}

__global__ void repack_scale_kernel(const __half* scale, std::int64_t n, std::int64_t k, int block, __half* out) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t count = block_count(n, block);
  const int blocks = blocks_per_tile(block);
  const std::int64_t scales = tile_count(n) * blocks * k;
  if (index < scales) {
    const std::int64_t channel = index / blocks % k, at = index / blocks / k * blocks + index % blocks;
    out[index] = at < count ? scale[channel * count + at] : __half(0.0f);
  } else if (index < scales + k) {
    const std::int64_t channel = index - scales;
    float largest = 0;
    for (std::int64_t i = 0; i < count; ++i) largest = fmaxf(largest, fabsf(__half2float(scale[channel * count + i])));
    out[index] = __float2half(largest);
  }
}

__global__ void unpack_scale_kernel(const __half* tiles, std::int64_t n, std::int64_t k, int block, __half* out) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t count = block_count(n, block);
  if (index >= count * k) return;
  const int blocks = blocks_per_tile(block);
  const std::int64_t channel = index / count, at = index % count;
  out[index] = tiles[(at / blocks * k + channel) * blocks + at % blocks];
}

__global__ void empty_kernel() {}

unsigned blocks_for(std::int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

}  // namespace

Status repack_plane(const std::uint8_t* plane, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream) {
  if (n == 0 || channels == 0) return {};
  repack_plane_kernel<<<blocks_for(plane_bytes(n, channels, width)), kThreads, 0, stream>>>(plane, n, channels, width,
                                                                                            out);
  return launched("repack");
}

Status unpack_plane(const std::uint8_t* tiles, std::int64_t n, std::int64_t channels, int width, std::uint8_t* out,
                    cudaStream_t stream) {
  if (n == 0 || channels == 0) return {};
  unpack_plane_kernel<<<blocks_for(plane_row_bytes(n, width) * channels), kThreads, 0, stream>>>(tiles, n, channels,
                                                                                                 width, out);
  return launched("unpack_tiles");
}

Status repack_scale(const std::uint16_t* scale, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream) {
  if (n == 0 || k == 0) return {};
  repack_scale_kernel<<<blocks_for(scale_count(n, k, block)), kThreads, 0, stream>>>(
      reinterpret_cast<const __half*>(scale), n, k, block, reinterpret_cast<__half*>(out));
  return launched("repack");
}

Status unpack_scale(const std::uint16_t* tiles, std::int64_t n, std::int64_t k, int block, std::uint16_t* out,
                    cudaStream_t stream) {
  if (n == 0 || k == 0) return {};
  unpack_scale_kernel<<<blocks_for(block_count(n, block) * k), kThreads, 0, stream>>>(
      reinterpret_cast<const __half*>(tiles), n, k, block, reinterpret_cast<__half*>(out));
  return launched("unpack_tiles");
}

Status settle(cudaStream_t stream) {
  empty_kernel<<<1, 1, 0, stream>>>();
  return launched("repack");
}

}  // namespace grinqh::cuda
