// The tile order of the CUDA backend: how a layer lies in GPU memory after `repack`. Private to the
// backend and never on disk; the canonical order is cpp/include/grinqh/format.h. Host and device alike.
//
// TILE      256 outputs. A tile's outputs are 16 matrix tiles of 16 rows, as mma.m16n8k32 has them:
//               output in tile = 16 * i + 8 * half + g      i = 0..15, half = 0..1, g = 0..7
//           g is the lane group (lane / 4) of the warp that holds this row of the operand.
//
// SUBPLANE  The kernels know planes of 1 and 2 bits. A plane of 4 or 8 bits becomes 2 or 4 subplanes
//           of 2 bits, most significant first, always read together.
//
// RUN       A channel's bits of one subplane and tile: 64 bytes (2 bits) or 32 bytes (1 bit), so that
//           each 2-bit run is one DRAM burst. Lane group g owns 8 (or 4) consecutive bytes of it:
//
//               2 bits: byte g * 8 + 2 * (i / 4) + half            1 bit: byte g * 4 + 2 * (i / 8) + half
//
//               | i%4=3 | i%4=2 | i%4=1 | i%4=0 |                  bit 2 * (i % 4) + (i / 4) % 2
//                 7   6   5   4   3   2   1   0
//
//           Masking a byte in place with 3 << 2 * (i % 4) (1 bit: after a shift by (i / 4) % 2, with
//           1 << 2 * (i % 4)) therefore leaves code * 4^(i % 4), an unsigned 8-bit operand, for both widths.
//
// PLANES    uint8 [subplanes of the plane][tiles][K_p][run]: one tensor per plane.
//
// SCALES    float16 [tiles][K][blocks per tile], then [K] the largest scale of each channel: together
//           [tiles * blocks per tile + 1, K]. Outputs beyond N have code bits and scales of 0.
#pragma once
#include <cstdint>

#include "grinqh/format.h"

#if defined(__CUDACC__)
#define GRINQH_HOST_DEVICE __host__ __device__
#else
#define GRINQH_HOST_DEVICE
#endif

namespace grinqh::cuda {

inline constexpr int kTile = 256;
inline constexpr int kSlab = 32;  // channels of one matrix instruction
inline constexpr int kMaxSubplanes = 8;

GRINQH_HOST_DEVICE constexpr int run_bytes(int sub_width) { return kTile * sub_width / 8; }
GRINQH_HOST_DEVICE constexpr std::int64_t tile_count(std::int64_t n) { return (n + kTile - 1) / kTile; }
GRINQH_HOST_DEVICE constexpr int blocks_per_tile(int block) { return kTile / block; }

// Width of a plane's subplanes, and how many they are.
GRINQH_HOST_DEVICE constexpr int sub_width(int width) { return width == 1 ? 1 : 2; }
GRINQH_HOST_DEVICE constexpr int sub_count(int width) { return width <= 2 ? 1 : width / 2; }

// Where an output's code lies in a run.
struct RunPosition {
  int byte;
  int shift;
};
GRINQH_HOST_DEVICE constexpr RunPosition run_position(int output, int sub_width) {
  const int i = output / 16, half = output / 8 % 2, g = output % 8;
  if (sub_width == 2) return {g * 8 + 2 * (i / 4) + half, 2 * (i % 4)};
  return {g * 4 + 2 * (i / 8) + half, 2 * (i % 4) + i / 4 % 2};
}

// The inverse: the output whose code lies at bit `shift` of byte `byte`.
GRINQH_HOST_DEVICE constexpr int run_output(int byte, int shift, int sub_width) {
  if (sub_width == 2) {
    const int i = byte % 8 / 2 * 4 + shift / 2;
    return 16 * i + 8 * (byte % 2) + byte / 8;
  }
  const int i = byte % 4 / 2 * 8 + shift % 2 * 4 + shift / 2;
  return 16 * i + 8 * (byte % 2) + byte / 4;
}

// Where a tile's run of a channel begins, in bytes from the subplane's first.
GRINQH_HOST_DEVICE constexpr std::int64_t run_offset(std::int64_t tile, std::int64_t channel, std::int64_t channels,
                                                     int run) {
  return (tile * channels + channel) * run;
}

// Bytes of one plane's tensor, and elements of the scales' tensor.
GRINQH_HOST_DEVICE constexpr std::int64_t plane_bytes(std::int64_t n, std::int64_t channels, int width) {
  return sub_count(width) * tile_count(n) * channels * run_bytes(sub_width(width));
}
GRINQH_HOST_DEVICE constexpr std::int64_t scale_count(std::int64_t n, std::int64_t k, int block) {
  return (tile_count(n) * blocks_per_tile(block) + 1) * k;
}

constexpr bool run_order_is_a_bijection(int sub_width) {
  for (int output = 0; output < kTile; ++output) {
    const RunPosition at = run_position(output, sub_width);
    if (at.byte < 0 || at.byte >= run_bytes(sub_width) || at.shift < 0 || at.shift + sub_width > 8) return false;
    if (run_output(at.byte, at.shift, sub_width) != output) return false;
  }
  return true;
}
static_assert(run_order_is_a_bijection(1) && run_order_is_a_bijection(2));
static_assert(run_bytes(2) == 64 && run_bytes(1) == 32 && tile_count(257) == 2);
static_assert(plane_bytes(256, 3, 8) == 4 * 3 * 64 && plane_bytes(257, 3, 1) == 2 * 3 * 32);

}  // namespace grinqh::cuda
