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
//         channels (all of one segment, so that they are alike), kept as two int8 halves: two dot products.
//         Sums are exact integers inside a group and float32 across groups. The constant part of a level is one
//         scalar for each block: (2^-bits - 1) * sum of coefficients, from the same integers.
//
//         Two quads of channels are read at a time, their rows from front to back, while the integer sums of
//         all outputs stay in the first cache: long runs in the order of memory are what memory delivers
//         fastest, and every byte is loaded once.
//
// ORDER   A chunk is kLanes * 4 bytes of a row. Interleaving within 128-bit parts gives four vectors:
//         lane 4 k + d of vector v holds byte 16 k + 4 v + d of the chunk, and field f of byte b is output
//         b * fields + f. Sums are kept as [chunk][vector][field][lane].
#pragma once
#include <cstdint>

#include "kernels.h"

namespace grinqh::cpu {
namespace {  // internal to each file that includes this

constexpr int kGroup = 128;  // channels that share a fixed-point scale
constexpr int kQuads = kGroup / 4;
constexpr int kMaxBlocks = static_cast<int>(kMaxOutputs) / 32;
constexpr int kCoefficientStride = kMaxBlocks + 16;  // a whole vector may be loaded from any block on
constexpr float kFixedPointMax = 32512.0f;           // both int8 halves of it fit: 127 * 256
constexpr int kMostChunkOutputs = 512;
constexpr int kSums = static_cast<int>(kMaxOutputs) + kMostChunkOutputs;  // the last chunk may be partly unused

constexpr int width_class(int width) { return width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3; }

// Exponents of normal float32 values only.
constexpr float power_of_two(int exponent) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(exponent + 127) << 23);
}

// Channels of one segment that are worked on together.
struct GroupChannels {
  const std::int32_t* channel;
  const float* coefficient;
  int count;
  int planes;
};

// The groups of a row's segments, in order.
class Groups {
 public:
  explicit Groups(const GradedRow& row) : row_(row) {}
  // A group of no channels when there are no more.
  GroupChannels next() {
    if (segment_ < row_.segments && at_ >= row_.segment[segment_].end) ++segment_;
    if (segment_ >= row_.segments) return {nullptr, nullptr, 0, 0};
    const Segment& segment = row_.segment[segment_];
    if (at_ < segment.begin) at_ = segment.begin;
    const std::int64_t left = segment.end - at_;
    const int count = left < kGroup ? static_cast<int>(left) : kGroup;
    const GroupChannels group{row_.channel + at_, row_.coefficient + at_, count, segment.planes};
    at_ += count;
    return group;
  }

 private:
  const GradedRow& row_;
  int segment_ = 0;
  std::int64_t at_ = 0;
};

// A group's coefficients as fixed point, for every block of the range.
struct Coefficients {
  int quads;
  std::int32_t channel[kGroup];  // padded with the first channel, whose padded coefficients are 0
  float unit;                    // what 1 of the fixed point is worth
  alignas(64) std::int32_t high[kQuads][kCoefficientStride];  // four int8 a block
  alignas(64) std::int32_t low[kQuads][kCoefficientStride];
  std::int32_t sum[kMaxBlocks];
};

template <typename Simd>
class VectorKernel {
  using Int = typename Simd::Int;
  static constexpr int kLanes = Simd::kLanes;  // 32-bit lanes of a vector
  static constexpr int kVectors = 4;           // that four rows' chunks are interleaved to
  static constexpr int kChunkBytes = kLanes * kVectors;

 public:
  static void sum_channels(const PackedWeight& weight, const GradedRow& row, Range outputs, float* sums) {
    alignas(64) float partial[4][kSums];  // by width class
    float constant[kMaxBlocks] = {};
    bool used[4] = {};
    for (int p = 0; p < weight.widths.count; ++p) used[width_class(weight.widths.width[p])] = true;
    const int count = static_cast<int>(outputs.end - outputs.begin);
    for (int c = 0; c < 4; ++c) {
      for (int i = 0; used[c] && i < count + kMostChunkOutputs; ++i) partial[c][i] = 0.0f;
    }
    Groups groups(row);
    Coefficients coefficients;
    GroupChannels following = groups.next();
    while (following.count > 0) {
      const GroupChannels group = following;
      following = groups.next();
      prefetch_scales(weight, following, outputs);
      if (!fill_coefficients(weight, group, outputs, coefficients)) continue;
      const float middle = power_of_two(-weight.widths.bits(group.planes)) - 1.0f;
      for (int b = 0; b * weight.block < count; ++b) {
        constant[b] += coefficients.unit * middle * static_cast<float>(coefficients.sum[b]);
      }
      for (int p = 0; p < group.planes; ++p) {
        const bool last = p + 1 == group.planes;
        const Upcoming upcoming = last ? Upcoming{following.channel, following.count, 0}
                                       : Upcoming{coefficients.channel, 4 * coefficients.quads, p + 1};
        add_plane(weight, p, coefficients, upcoming, outputs, partial[width_class(weight.widths.width[p])]);
      }
    }
    gather_sums(weight, count, used, partial, constant, sums);
  }

 private:
  template <int Value>
  struct Constant {
    static constexpr int value = Value;
  };

  // The rows that are read after a plane's: worth fetching while its last ones are multiplied.
  struct Upcoming {
    const std::int32_t* channel;
    int count;
    int plane;
  };

  static void prefetch_scales(const PackedWeight& weight, GroupChannels group, Range outputs) {
    const std::int64_t stride = block_count(weight.n, weight.block);
    const std::int64_t first = outputs.begin / weight.block;
    const std::int64_t blocks = block_count(outputs.end, weight.block) - first;
    for (int c = 0; c < group.count; ++c) {
      const std::uint16_t* scales = weight.block_scale + group.channel[c] * stride + first;
      for (std::int64_t b = 0; b < blocks; b += 32) __builtin_prefetch(scales + b, 0, 2);  // a cache line holds 32
    }
  }

  // Which of a group's listed channels is worked on as its c-th. The eight rows that are read together come from eight
  // parts of the list, each read in order: two rows in one page would hide from the prefetcher that they are streams.
  static int listed_at(int c, int quads) {
    const int odd = quads % 2;  // then the first quad is read alone, as the second half of a pair
    const int pair = (c / 4 + odd) / 2;
    const int pairs = (quads + odd) / 2;
    const bool second = (c / 4 + odd) % 2 != 0;
    return second ? 4 * (pairs - odd) + c % 4 * pairs + pair : c % 4 * (pairs - odd) + pair - odd;
  }

  // False where every coefficient is zero, so that there is nothing to add.
  static bool fill_coefficients(const PackedWeight& weight, GroupChannels group, Range outputs, Coefficients& out) {
    const std::int64_t stride = block_count(weight.n, weight.block);
    const std::int64_t first_block = outputs.begin / weight.block;
    const int blocks = static_cast<int>(block_count(outputs.end, weight.block) - first_block);
    const std::uint16_t* scales = weight.block_scale + first_block;
    out.quads = (group.count + 3) / 4;
    float largest = 0.0f;
    float coefficient[kGroup];
    typename Simd::ScaleMax largest_scale{};
    for (int c = 0; c < out.quads * 4; ++c) {
      const int source = listed_at(c, out.quads);
      out.channel[c] = group.channel[source < group.count ? source : 0];
      coefficient[c] = source < group.count ? group.coefficient[source] : 0.0f;
      if (source >= group.count) continue;
      const float magnitude = coefficient[c] < 0.0f ? -coefficient[c] : coefficient[c];
      largest = magnitude > largest ? magnitude : largest;
      largest_scale.add(scales + out.channel[c] * stride, blocks);
    }
    const float bound = largest * largest_scale.value();
    if (bound == 0.0f) return false;
    out.unit = bound / kFixedPointMax;
    const float per_unit = kFixedPointMax / bound;

    for (int b = 0; b < blocks; b += kLanes) {
      const int lanes = blocks - b < kLanes ? blocks - b : kLanes;
      Int sum = Simd::zero();
      for (int q = 0; q < out.quads; ++q) {
        Int high = Simd::zero();
        Int low = Simd::zero();
        const auto add_channel = [&](auto place) {
          constexpr int kPlace = decltype(place)::value;
          const int c = 4 * q + kPlace;
          const float factor = coefficient[c] * per_unit;
          const Int fixed = Simd::scaled_to_int(scales + out.channel[c] * stride + b, lanes, factor);
          sum = Simd::add(sum, fixed);
          const Int rounded = Simd::template shift_right<8>(Simd::add(fixed, Simd::broadcast(128)));
          high = Simd::bit_or(high, Simd::template place_byte<kPlace>(rounded));
          low = Simd::bit_or(low, Simd::template place_byte<kPlace>(fixed));
        };
        add_channel(Constant<0>{});
        add_channel(Constant<1>{});
        add_channel(Constant<2>{});
        add_channel(Constant<3>{});
        Simd::store(out.high[q] + b, high);
        Simd::store(out.low[q] + b, low);
      }
      alignas(64) std::int32_t block_sums[kLanes];
      Simd::store(block_sums, sum);
      for (int lane = 0; lane < lanes; ++lane) out.sum[b + lane] = block_sums[lane];
    }
    return true;
  }

  static void add_plane(const PackedWeight& weight, int plane, const Coefficients& coefficients, Upcoming upcoming,
                        Range outputs, float* sums) {
    switch (weight.widths.width[plane]) {
      case 1: add_plane_of<1>(weight, plane, coefficients, upcoming, outputs, sums); return;
      case 2: add_plane_of<2>(weight, plane, coefficients, upcoming, outputs, sums); return;
      case 4: add_plane_of<4>(weight, plane, coefficients, upcoming, outputs, sums); return;
      default: add_plane_of<8>(weight, plane, coefficients, upcoming, outputs, sums); return;
    }
  }

  template <int Width>
  static void add_plane_of(const PackedWeight& weight, int plane, const Coefficients& coefficients, Upcoming upcoming,
                           Range outputs, float* sums) {
    const std::uint8_t* base = weight.plane[plane] + outputs.begin * Width / 8;
    const std::int64_t stride = plane_row_bytes(weight.n, Width);
    const int bytes = static_cast<int>(plane_row_bytes(outputs.end - outputs.begin, Width));
    const int block = static_cast<int>(weight.block);
    alignas(64) std::int32_t high[kSums];
    alignas(64) std::int32_t low[kSums];
    const std::uint8_t* row[kGroup + 8];
    const int rows = coefficients.quads * 4;
    for (int c = 0; c < rows; ++c) row[c] = base + coefficients.channel[c] * stride;
    const int next_width = weight.widths.width[upcoming.plane];
    const std::uint8_t* next_base = weight.plane[upcoming.plane] + outputs.begin * next_width / 8;
    for (int c = 0; c < 8; ++c) {
      row[rows + c] = c < upcoming.count ? next_base + upcoming.channel[c] * plane_row_bytes(weight.n, next_width)
                                         : row[0];  // in the cache already
    }

    add_rows<Width, true>(coefficients, row, 0, bytes, block, high, low);
    for (int q = coefficients.quads % 2 == 0 ? 2 : 1; q < coefficients.quads; q += 2) {
      add_rows<Width, false>(coefficients, row, q, bytes, block, high, low);
    }

    constexpr int kFields = 8 / Width;
    const float unit = coefficients.unit * power_of_two(1 - weight.widths.bits(plane + 1));
    const int vectors = (bytes + kChunkBytes - 1) / kChunkBytes * kVectors;
    for (int v = 0; v < vectors; ++v) {
      const int at = v * kFields * kLanes;
      add_to_float<Width, 0>(high + at, low + at, unit, sums + at);
    }
  }

  template <int Width, int Field>
  static inline __attribute__((always_inline)) void add_to_float(const std::int32_t* high, const std::int32_t* low,
                                                                 float unit, float* sums) {
    constexpr float kPlace = power_of_two(-Simd::template field_exponent<Width, Field>());
    constexpr int kAt = Field * kLanes;
    const Int sum = Simd::add(Simd::template shift_left<8>(Simd::load(high + kAt)), Simd::load(low + kAt));
    Simd::add_scaled(sums + kAt, sum, unit * kPlace);
    if constexpr ((Field + 1) * Width < 8) add_to_float<Width, Field + 1>(high, low, unit, sums);
  }

  // Rows of two quads from the front to the end of the range (of one quad if First and their number is odd).
  template <int Width, bool First>
  static void add_rows(const Coefficients& coefficients, const std::uint8_t* const* row, int quad, int bytes, int block,
                       std::int32_t* high, std::int32_t* low) {
    const bool two = !First || coefficients.quads % 2 == 0;
    const int ahead = 4 * (quad + (two ? 2 : 1));
    constexpr int kFields = 8 / Width;
    constexpr int kChunkOutputs = kChunkBytes * kFields;
    for (int at = 0; at < bytes; at += kChunkBytes) {
      const int left = bytes - at < kChunkBytes ? bytes - at : kChunkBytes;
      const int first_output = at * kFields;
      for (int r = 0; r < 8; ++r) __builtin_prefetch(row[ahead + r] + at);
      const std::uint8_t* const* rows = row + 4 * quad;
      const std::int32_t* high_coefficients = coefficients.high[quad] + first_output / block;
      const std::int32_t* low_coefficients = coefficients.low[quad] + first_output / block;
      const int sums = at / kChunkBytes * kChunkOutputs;
      const int begin = first_output % block;
      if (two) {
        add_chunk<Width, First, true>(rows, at, left, begin, block, high_coefficients, low_coefficients, high + sums,
                                      low + sums);
      } else {
        add_chunk<Width, First, false>(rows, at, left, begin, block, high_coefficients, low_coefficients, high + sums,
                                       low + sums);
      }
    }
  }

  // Four interleaved vectors of a chunk of four rows.
  struct Quad {
    Int vector[kVectors];
    Quad(const std::uint8_t* const* row, int at, int bytes) {
      const Int a = load_row(row[0] + at, bytes), b = load_row(row[1] + at, bytes);
      const Int c = load_row(row[2] + at, bytes), d = load_row(row[3] + at, bytes);
      const Int ab_low = Simd::zip_bytes_low(a, b), ab_high = Simd::zip_bytes_high(a, b);
      const Int cd_low = Simd::zip_bytes_low(c, d), cd_high = Simd::zip_bytes_high(c, d);
      vector[0] = Simd::zip_pairs_low(ab_low, cd_low);
      vector[1] = Simd::zip_pairs_high(ab_low, cd_low);
      vector[2] = Simd::zip_pairs_low(ab_high, cd_high);
      vector[3] = Simd::zip_pairs_high(ab_high, cd_high);
    }
    static Int load_row(const std::uint8_t* bytes, int count) {
      return count == kChunkBytes ? Simd::load_bytes(bytes) : Simd::load_bytes_tail(bytes, count);
    }
  };

  // The coefficients of two quads, each lane with that of its block.
  struct Spread {
    Int high_one, low_one, high_two, low_two;
    Spread() = default;
    template <typename LaneBlocks>
    Spread(const std::int32_t* high, const std::int32_t* low, bool two, LaneBlocks lane_block) {
      const int second = two ? kCoefficientStride : 0;
      high_one = Simd::spread(high, lane_block);
      low_one = Simd::spread(low, lane_block);
      high_two = Simd::spread(high + second, lane_block);
      low_two = Simd::spread(low + second, lane_block);
    }
  };

  template <int Width, bool First, bool Two>
  static __attribute__((noinline)) void add_chunk(const std::uint8_t* const* row, int at, int bytes, int begin,
                                                  int block, const std::int32_t* high_coefficients,
                                                  const std::int32_t* low_coefficients, std::int32_t* high,
                                                  std::int32_t* low) {
    const Quad one(row, at, bytes);
    const Quad two(row + (Two ? 4 : 0), at, bytes);
    // Vector v holds bytes 4 v to 4 v + 3 of every 16: so many vectors in a row lie in the same blocks.
    if (block * Width % (16 * 8) == 0) {
      add_vectors<Width, First, Two, 4, 0>(one, two, begin, block, high_coefficients, low_coefficients, Spread{}, high,
                                           low);
    } else if (block * Width % (8 * 8) == 0) {
      add_vectors<Width, First, Two, 2, 0>(one, two, begin, block, high_coefficients, low_coefficients, Spread{}, high,
                                           low);
    } else {
      add_vectors<Width, First, Two, 1, 0>(one, two, begin, block, high_coefficients, low_coefficients, Spread{}, high,
                                           low);
    }
  }

  template <int Width, bool First, bool Two, int Alike, int Vector>
  static inline __attribute__((always_inline)) void add_vectors(const Quad& one, const Quad& two, int begin, int block,
                                                                const std::int32_t* high_coefficients,
                                                                const std::int32_t* low_coefficients, Spread spread,
                                                                std::int32_t* high, std::int32_t* low) {
    constexpr int kFields = 8 / Width;
    constexpr int kAt = Vector * kFields * kLanes;
    if constexpr (Vector % Alike == 0) {
      spread =
          Spread(high_coefficients, low_coefficients, Two, Simd::template lane_blocks<Vector, kFields>(begin, block));
    }
    add_fields<Width, First, Two, 0>(one.vector[Vector], two.vector[Vector], spread, high + kAt, low + kAt);
    if constexpr (Vector + 1 < kVectors) {
      add_vectors<Width, First, Two, Alike, Vector + 1>(one, two, begin, block, high_coefficients, low_coefficients,
                                                        spread, high, low);
    }
  }

  template <int Width, bool First, bool Two, int Field>
  static inline __attribute__((always_inline)) void add_fields(Int one, Int two, const Spread& spread,
                                                               std::int32_t* high, std::int32_t* low) {
    constexpr int kAt = Field * kLanes;
    Int high_sum = First ? Simd::zero() : Simd::load(high + kAt);
    Int low_sum = First ? Simd::zero() : Simd::load(low + kAt);
    const Int field_one = Simd::template field<Width, Field>(one);
    high_sum = Simd::template dot<Width, Field>(high_sum, field_one, spread.high_one);
    low_sum = Simd::template dot<Width, Field>(low_sum, field_one, spread.low_one);
    if constexpr (Two) {
      const Int field_two = Simd::template field<Width, Field>(two);
      high_sum = Simd::template dot<Width, Field>(high_sum, field_two, spread.high_two);
      low_sum = Simd::template dot<Width, Field>(low_sum, field_two, spread.low_two);
    }
    Simd::store(high + kAt, high_sum);
    Simd::store(low + kAt, low_sum);
    if constexpr ((Field + 1) * Width < 8) {
      add_fields<Width, First, Two, Field + 1>(one, two, spread, high, low);
    }
  }

  static void gather_sums(const PackedWeight& weight, int count, const bool* used, const float (*partial)[kSums],
                          const float* constant, float* sums) {
    const int block = static_cast<int>(weight.block);
    for (int begin = 0; begin < count; begin += block) {
      for (int i = begin; i < begin + block && i < count; ++i) sums[i] = constant[begin / block];
    }
    if (used[0]) gather_class<1>(count, partial[0], sums);
    if (used[1]) gather_class<2>(count, partial[1], sums);
    if (used[2]) gather_class<4>(count, partial[2], sums);
    if (used[3]) gather_class<8>(count, partial[3], sums);
  }

  template <int Width>
  static void gather_class(int count, const float* partial, float* sums) {
    constexpr int kFields = 8 / Width;
    constexpr int kChunkOutputs = kChunkBytes * kFields;
    for (int chunk = 0; chunk < count; chunk += kChunkOutputs) {
      alignas(64) float ordered[kChunkOutputs];
      for (int part = 0; part < kLanes; part += 4) {
        for (int vector = 0; vector < kVectors; ++vector) {
          for (int field = 0; field < kFields; ++field) {
            const float* from = partial + chunk + (vector * kFields + field) * kLanes + part;
            float* to = ordered + (4 * part + 4 * vector) * kFields + field;
            for (int d = 0; d < 4; ++d) to[d * kFields] = from[d];
          }
        }
      }
      const int outputs = count - chunk < kChunkOutputs ? count - chunk : kChunkOutputs;
      for (int i = 0; i < outputs; ++i) sums[chunk + i] += ordered[i];
    }
  }
};

}  // namespace
}  // namespace grinqh::cpu
