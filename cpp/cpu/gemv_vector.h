// The vector kernels' common body. Each instruction set instantiates it with a `Simd` of its own, declared in
// an unnamed namespace: nothing here may be shared between files that are compiled for different instruction
// sets, which is also why no standard library template is used.
//
// HOW     The plane's bits are used as the unsigned bytes of an integer dot product, where they lie: one AND
//         picks a field of every byte, and the field's place in the byte is a power of two taken out at the
//         end. Four channels are interleaved so that each 32-bit lane holds one byte of each:
//
//           rows of four channels    a0 a1 a2 ..   b0 b1 b2 ..   c0 c1 c2 ..   d0 d1 d2 ..
//           interleaved              a0 b0 c0 d0 | a1 b1 c1 d1 | a2 b2 c2 d2 | ..
//           AND field 0 (width 2)    codes of outputs 0, 4, 8, .. of the four channels
//           dot with their four coefficients (int8), 32-bit sums
//
//         The coefficients x * gain * block_scale become 16-bit fixed point with one scale for a group of
//         channels (all of one segment, so that they are alike), kept as two int8 halves: two dot products. Sums are
//         exact integers inside a group and float32 across groups. The constant part of a level is one
//         scalar for each block: (2^-bits - 1) * sum of coefficients, from the same integers.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace grinqh::cpu {
namespace {  // internal to each file that includes this

constexpr int kGroup = 128;             // channels that share a fixed-point scale
constexpr int kQuads = kGroup / 4;
constexpr int kStrip = 512;             // outputs for which a group's coefficients are made at a time
constexpr int kMaxBlocks = kStrip / 32;
constexpr int kCoefficientStride = kMaxBlocks + 16;  // a whole vector may be loaded from any block on
constexpr float kFixedPointMax = 32512.0f;  // both int8 halves of it fit: 127 * 256
constexpr int kLineBytes = 64;

constexpr int width_class(int width) { return width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3; }

// Exponents of normal float32 values only.
constexpr float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(exponent + 127) << 23);
}

struct Group {
  int quads;
  std::int32_t channel[kGroup];  // padded with the first channel, whose padded coefficients are 0
  float unit;                    // what 1 of the fixed point is worth
  alignas(64) std::int32_t high[kQuads][kCoefficientStride];  // four int8 a block
  alignas(64) std::int32_t low[kQuads][kCoefficientStride];
  std::int32_t sum[kMaxBlocks];  // of the coefficients
};

// Walks the rows of the group that comes next, a cache line a step: long runs in the order of memory are what the
// memory delivers fastest, while the kernel itself reads a strip of every row at a time.
struct Prefetcher {
  const std::uint8_t* base;     // of the plane, at the first output of the range
  std::int64_t stride;          // bytes from channel to channel
  std::int64_t run;             // bytes of a channel in the range
  const std::int32_t* channel;  // the next one to walk
  const std::int32_t* last;     // past the end
  const std::uint8_t* at;       // in the present channel
  const std::uint8_t* end;

  void step() {
    if (at >= end) {
      if (channel == last) return;
      at = base + *channel++ * stride;
      end = at + run;
    }
    __builtin_prefetch(at, 0, 2);
    at += kLineBytes;
  }
};

template <typename Simd>
class VectorKernel {
  using Int = typename Simd::Int;
  static constexpr int kLanes = Simd::kLanes;  // 32-bit lanes: bytes of each channel in one vector

 public:
  static void sum_channels(const PackedWeight& weight, const GradedRow& row, Range outputs, float* sums) {
    // Sums by width class, in the order in which the fields leave the vectors.
    alignas(64) float partial[4][kMaxOutputs];
    float constant[kMaxOutputs / 32] = {};
    bool used[4] = {};
    for (int p = 0; p < weight.widths.count; ++p) used[width_class(weight.widths.width[p])] = true;
    for (int c = 0; c < 4; ++c) {
      for (int i = 0; used[c] && i < kMaxOutputs; ++i) partial[c][i] = 0.0f;
    }
    Group group;
    const std::int64_t listed = row.segments > 0 ? row.segment[row.segments - 1].end : 0;
    for (int s = 0; s < row.segments; ++s) {
      const Segment& segment = row.segment[s];
      const float middle = power_of_two(-weight.widths.bits(segment.planes)) - 1.0f;
      for (std::int64_t i = segment.begin; i < segment.end; i += kGroup) {
        const std::int64_t left = segment.end - i;
        const int count = left < kGroup ? static_cast<int>(left) : kGroup;
        const std::int64_t next_left = listed - (i + count);
        const std::int32_t* next = row.channel + i + count;
        const std::int32_t* next_end = next + (next_left < kGroup ? next_left : kGroup);
        Prefetcher prefetcher[kMaxPlanes];
        for (int p = 0; p < segment.planes; ++p) {
          const int width = weight.widths.width[p];
          const std::uint8_t* base = weight.plane[p] + outputs.begin * width / 8;
          prefetcher[p] = {base, plane_row_bytes(weight.n, width), plane_row_bytes(outputs.end - outputs.begin, width),
                           next, next_end, base, base};
        }
        for (std::int64_t begin = outputs.begin; begin < outputs.end; begin += kStrip) {
          const Range strip{begin, begin + kStrip < outputs.end ? begin + kStrip : outputs.end};
          const std::int64_t first_block = begin / weight.block;
          const int blocks = static_cast<int>((strip.end - 1) / weight.block - first_block) + 1;
          if (!fill_group(weight, row, i, count, first_block, blocks, group)) continue;
          const std::int64_t at = begin - outputs.begin;
          for (int b = 0; b < blocks; ++b) {
            constant[at / weight.block + b] += group.unit * middle * static_cast<float>(group.sum[b]);
          }
          for (int p = 0; p < segment.planes; ++p) {
            const int width = weight.widths.width[p];
            add_plane(weight, p, group, prefetcher[p], strip, partial[width_class(width)] + at);
          }
        }
      }
    }
    gather_sums(weight, outputs, used, partial, constant, sums);
  }

 private:
  // False where every coefficient is zero, so that there is nothing to add.
  static bool fill_group(const PackedWeight& weight, const GradedRow& row, std::int64_t i, int count,
                         std::int64_t first_block, int blocks, Group& group) {
    const std::int64_t stride = block_count(weight.n, weight.block);
    const std::uint16_t* scales = weight.block_scale + first_block;
    group.quads = (count + 3) / 4;
    float largest = 0.0f;
    typename Simd::ScaleMax largest_scale{};
    for (int c = 0; c < group.quads * 4; ++c) {
      group.channel[c] = row.channel[c < count ? i + c : i];
      if (c >= count) continue;
      const float coefficient = row.coefficient[i + c];
      const float magnitude = coefficient < 0.0f ? -coefficient : coefficient;
      largest = magnitude > largest ? magnitude : largest;
      largest_scale.add(scales + group.channel[c] * stride, blocks);
    }
    const float bound = largest * largest_scale.value();
    if (bound == 0.0f) return false;
    group.unit = bound / kFixedPointMax;
    const float per_unit = kFixedPointMax / bound;

    for (int b = 0; b < blocks; b += kLanes) {
      const int lanes = blocks - b < kLanes ? blocks - b : kLanes;
      Int sum = Simd::zero();
      for (int q = 0; q < group.quads; ++q) {
        Int high = Simd::zero();
        Int low = Simd::zero();
        const auto add_channel = [&](auto place) {
          constexpr int kPlace = decltype(place)::value;
          const int c = 4 * q + kPlace;
          const float factor = c < count ? row.coefficient[i + c] * per_unit : 0.0f;
          const Int fixed = Simd::scaled_to_int(scales + group.channel[c] * stride + b, lanes, factor);
          sum = Simd::add(sum, fixed);
          high = Simd::bit_or(high, Simd::template place_byte<kPlace>(Simd::template shift_right<8>(
                                        Simd::add(fixed, Simd::broadcast(128)))));
          low = Simd::bit_or(low, Simd::template place_byte<kPlace>(fixed));
        };
        add_channel(Constant<0>{});
        add_channel(Constant<1>{});
        add_channel(Constant<2>{});
        add_channel(Constant<3>{});
        Simd::store(group.high[q] + b, high);
        Simd::store(group.low[q] + b, low);
      }
      alignas(64) std::int32_t sums[kLanes];
      Simd::store(sums, sum);
      for (int lane = 0; lane < lanes; ++lane) group.sum[b + lane] = sums[lane];
    }
    return true;
  }

  template <int Value>
  struct Constant {
    static constexpr int value = Value;
  };

  static void add_plane(const PackedWeight& weight, int plane, const Group& group, Prefetcher& prefetcher,
                        Range outputs, float* sums) {
    switch (weight.widths.width[plane]) {
      case 1: add_plane_of<1>(weight, plane, group, prefetcher, outputs, sums); return;
      case 2: add_plane_of<2>(weight, plane, group, prefetcher, outputs, sums); return;
      case 4: add_plane_of<4>(weight, plane, group, prefetcher, outputs, sums); return;
      default: add_plane_of<8>(weight, plane, group, prefetcher, outputs, sums); return;
    }
  }

  template <int Width>
  static void add_plane_of(const PackedWeight& weight, int plane, const Group& group, Prefetcher& prefetcher,
                           Range outputs, float* sums) {
    const std::int64_t stride = plane_row_bytes(weight.n, Width);
    const std::uint8_t* base = weight.plane[plane] + outputs.begin * Width / 8;
    const std::uint8_t* row[kGroup];
    for (int c = 0; c < group.quads * 4; ++c) {
      row[c] = base + group.channel[c] * stride;
    }
    const float unit = group.unit * power_of_two(1 - weight.widths.bits(plane + 1));
    const int block = static_cast<int>(weight.block);
    const int bytes = static_cast<int>(plane_row_bytes(outputs.end - outputs.begin, Width));
    constexpr int kOutputs = kLanes * 8 / Width;  // of one vector
    for (int line = 0; line < bytes; line += kLineBytes) {
      const int left = bytes - line < kLineBytes ? bytes - line : kLineBytes;
      const int chunks = (left + kLanes - 1) / kLanes;
      alignas(64) Int staged[kLineBytes / kLanes][kQuads];
      interleave_line(row, group.quads, line, left, staged);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int first = (line + chunk * kLanes) * 8 / Width;
        if (block % kOutputs == 0) {
          add_chunk<Width, true>(group, staged[chunk], prefetcher, first / block, block, unit, sums + first);
        } else {
          add_chunk<Width, false>(group, staged[chunk], prefetcher, first / block, block, unit, sums + first);
        }
      }
    }
  }

  // Reads a cache line of every row once: rows may lie a power of two apart, where few fit in the first cache.
  static void interleave_line(const std::uint8_t* const* row, int quads, int line, int bytes,
                              Int (*staged)[kQuads]) {
    for (int q = 0; q < quads; ++q) {
      const std::uint8_t* a = row[4 * q] + line;
      const std::uint8_t* b = row[4 * q + 1] + line;
      const std::uint8_t* c = row[4 * q + 2] + line;
      const std::uint8_t* d = row[4 * q + 3] + line;
      int at = 0;
      for (; at + kLanes <= bytes; at += kLanes) {
        staged[at / kLanes][q] = Simd::interleave(a + at, b + at, c + at, d + at);
      }
      if (at < bytes) staged[at / kLanes][q] = Simd::interleave_tail(a + at, b + at, c + at, d + at, bytes - at);
    }
  }

  // One vector of outputs over all channels of the group.
  template <int Width, bool OneBlock>
  static __attribute__((noinline)) void add_chunk(const Group& group, const Int* staged,
                                                  Prefetcher& prefetcher, int block, int block_size, float unit,
                                                  float* sums) {
    constexpr int kFields = 8 / Width;
    const Int lane_block = OneBlock ? Simd::zero() : Simd::lane_blocks(kFields, block_size);
    const std::int32_t* high_coefficients = group.high[0] + block;
    const std::int32_t* low_coefficients = group.low[0] + block;
    Int high[kFields];
    Int low[kFields];
    clear_fields<Width, 0>(high, low);
    Prefetcher ahead = prefetcher;
    for (int q = 0; q < group.quads; ++q) {
      ahead.step();
      const std::int32_t* high_at = high_coefficients + q * kCoefficientStride;
      const std::int32_t* low_at = low_coefficients + q * kCoefficientStride;
      const Int high_coefficient = OneBlock ? Simd::broadcast(*high_at) : Simd::spread(high_at, lane_block);
      const Int low_coefficient = OneBlock ? Simd::broadcast(*low_at) : Simd::spread(low_at, lane_block);
      add_fields<Width, 0>(staged[q], high_coefficient, low_coefficient, high, low);
    }
    prefetcher = ahead;
    flush_fields<Width, 0>(high, low, unit, sums);
  }

  // The fields are unrolled by recursion: with constant indices the sums stay in registers.
  template <int Width, int Field>
  static inline __attribute__((always_inline)) void clear_fields(Int* high, Int* low) {
    high[Field] = low[Field] = Simd::zero();
    if constexpr ((Field + 1) * Width < 8) clear_fields<Width, Field + 1>(high, low);
  }

  template <int Width, int Field>
  static inline __attribute__((always_inline)) void add_fields(Int bytes, Int high_coefficient, Int low_coefficient,
                                                               Int* high, Int* low) {
    const Int field = Simd::template field<Width, Field>(bytes);
    high[Field] = Simd::template dot<Width, Field>(high[Field], field, high_coefficient);
    low[Field] = Simd::template dot<Width, Field>(low[Field], field, low_coefficient);
    if constexpr ((Field + 1) * Width < 8) {
      add_fields<Width, Field + 1>(bytes, high_coefficient, low_coefficient, high, low);
    }
  }

  template <int Width, int Field>
  static inline __attribute__((always_inline)) void flush_fields(const Int* high, const Int* low, float unit,
                                                                 float* sums) {
    constexpr float kPlace = power_of_two(-Simd::template field_exponent<Width, Field>());
    Simd::add_scaled(sums + Field * kLanes, Simd::add(Simd::template shift_left<8>(high[Field]), low[Field]),
                     unit * kPlace);
    if constexpr ((Field + 1) * Width < 8) flush_fields<Width, Field + 1>(high, low, unit, sums);
  }

  // Field f of byte l of a chunk is output l * fields + f of the chunk.
  static void gather_sums(const PackedWeight& weight, Range outputs, const bool* used,
                          const float (*partial)[kMaxOutputs], const float* constant, float* sums) {
    const int count = static_cast<int>(outputs.end - outputs.begin);
    const int block = static_cast<int>(weight.block);
    for (int i = 0; i < count; ++i) sums[i] = constant[i / block];
    for (int c = 0; c < 4; ++c) {
      if (!used[c]) continue;
      const int fields = 8 >> c;
      const int chunk_outputs = kLanes * fields;
      for (int begin = 0; begin < count; begin += chunk_outputs) {
        const int end = begin + chunk_outputs < count ? begin + chunk_outputs : count;
        for (int i = begin; i < end; ++i) {
          const int within = i - begin;
          sums[i] += partial[c][begin + within % fields * kLanes + within / fields];
        }
      }
    }
  }
};

}  // namespace
}  // namespace grinqh::cpu
