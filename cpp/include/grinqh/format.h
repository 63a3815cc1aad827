// The packed format: the one definition that the packer, the CPU kernels, the CUDA kernels and the
// documentation cite. Plain C++20, no torch, no CUDA header; compiles for host and device alike.
//
// WORDS   n, k    out_features and in_features of a linear layer W[n][k]
//         channel one input feature j: the column W[:, j]. They are stored in an order that the
//                 layer carries: stored channel c is input feature channel_order[c].
//         plane   a slice of the bits of the codes, most significant plane first
//         grade   how many planes of a channel are read; grade 0 skips the channel
//
// CODE    A weight is an 8-bit mid-rise code q of its scale s = row_scale[n] * block_scale[c][n / block]:
//                 q = clamp(floor(128 * w / s) + 128, 0, 255)
//         Its top b bits, t = q >> (8 - b), stand for the middle of their interval of [-s, s):
//                 w_b = gain_b * s * ((2 * t + 1) / 2^b - 1)                    (grade 0 stands for 0)
//         gain_b is one least-squares scalar for each layer and grade.
//
// PLANES  Models are converted to plane widths 2,2,2,2 unless others are asked for. With 2,1,1,2,2, for example,
//         the code bits are cut like this (bit 7 on the left):
//
//                 bit      7 6 | 5 | 4 | 3 2 | 1 0
//                 plane     0  | 1 | 2 |  3  |  4        grade g reads planes 0 .. g-1:
//                 bits read 2    3   4    6     8        grade   1   2   3   4   5
//
//         Plane p is uint8[channels_p][plane_row_bytes(n, width_p)]. The row of stored channel c holds
//         the bits of its n codes in order, the first code in the lowest bits of the first byte:
//
//                 width 2, one byte:   | n+3 | n+2 | n+1 | n+0 |      (bit 7 on the left)
//                 width 1, one byte:   |n+7|n+6|n+5|n+4|n+3|n+2|n+1|n+0|
//
//         Unused bits of a row's last byte are 0. A width divides 8, so no code straddles a byte.
//         channels_p never grows with p: deeper planes may be stored for a prefix of the stored
//         channels only ("stored bits"), and a channel's grade ends at its last stored plane.
//
// SCALES  block_scale is float16[k][block_count(n, block)], blocks run along n inside one channel;
//         row_scale is float32[n]; gain is float32[planes], gain[g - 1] for grade g.
#pragma once
#include <cstdint>

namespace grinqh {

inline constexpr int kFormatVersion = 1;
inline constexpr int kCodeBits = 8;
inline constexpr int kMaxPlanes = 8;  // eight planes of one bit

constexpr bool is_plane_width(int width) { return width == 1 || width == 2 || width == 4 || width == 8; }
constexpr bool is_block(std::int64_t block) { return block == 32 || block == 64 || block == 128; }

// Bytes of one channel's row in a plane.
constexpr std::int64_t plane_row_bytes(std::int64_t n, int width) { return (n * width + 7) / 8; }

// Scales of one channel.
constexpr std::int64_t block_count(std::int64_t n, std::int64_t block) { return (n + block - 1) / block; }

// How a code is cut: widths of the planes, most significant first. Fewer than 8 bits in all is a
// layer whose lowest planes were left out.
struct PlaneWidths {
  int count = 0;
  int width[kMaxPlanes] = {};

  // Bits read at a grade: bits(0) == 0.
  constexpr int bits(int grade) const {
    int sum = 0;
    for (int p = 0; p < grade; ++p) sum += width[p];
    return sum;
  }
  // Position in the code of plane p's lowest bit.
  constexpr int shift(int plane) const { return kCodeBits - bits(plane + 1); }

  constexpr bool valid() const {
    if (count < 1 || count > kMaxPlanes) return false;
    for (int p = 0; p < count; ++p) {
      if (!is_plane_width(width[p])) return false;
    }
    return bits(count) <= kCodeBits;
  }
};

inline constexpr PlaneWidths kFourEqualPlanes{4, {2, 2, 2, 2}};
inline constexpr PlaneWidths kFinePlanes{5, {2, 1, 1, 2, 2}};

// The middle of the interval that the top `bits` bits `t` of a code stand for, in units of the scale.
constexpr float level(unsigned t, int bits) {
  return static_cast<float>(2 * t + 1) / static_cast<float>(1u << bits) - 1.0f;
}

static_assert(kFourEqualPlanes.valid() && kFinePlanes.valid());
static_assert(kFinePlanes.bits(0) == 0 && kFinePlanes.bits(3) == 4 && kFinePlanes.bits(5) == kCodeBits);
static_assert(kFinePlanes.shift(0) == 6 && kFinePlanes.shift(1) == 5 && kFinePlanes.shift(4) == 0);
static_assert(plane_row_bytes(1, 1) == 1 && plane_row_bytes(576, 2) == 144 && plane_row_bytes(7, 2) == 2);
static_assert(block_count(1, 64) == 1 && block_count(576, 64) == 9 && block_count(577, 64) == 10);
static_assert(level(0, 2) == -0.75f && level(3, 2) == 0.75f && level(255, 8) == 255.0f / 256.0f);

}  // namespace grinqh
