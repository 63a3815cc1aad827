// NEON with the dot-product extension of Armv8.2.
#include <arm_neon.h>

#include "gemv_vector.h"

namespace grinqh::cpu {
namespace {

struct Neon {
  using Int = int32x4_t;
  static constexpr int kLanes = 4;

  static Int zero() { return vdupq_n_s32(0); }
  static Int broadcast(std::int32_t value) { return vdupq_n_s32(value); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int bit_or(Int a, Int b) { return vorrq_s32(a, b); }
  template <int Bits>
  static Int shift_left(Int a) {
    return vshlq_n_s32(a, Bits);
  }
  template <int Bits>
  static Int shift_right(Int a) {
    return vshrq_n_s32(a, Bits);
  }
  // The low byte of each lane, moved to a place in the lane.
  template <int Place>
  static Int place_byte(Int a) {
    const Int byte = vandq_s32(a, vdupq_n_s32(0xff));
    if constexpr (Place == 0) return byte;
    return vshlq_n_s32(byte, 8 * Place);
  }
  static void store(std::int32_t* out, Int a) { vst1q_s32(out, a); }

  // Up to four float16 values, zeros after them.
  static uint16x4_t load_halves(const std::uint16_t* values, int count) {
    if (count >= 4) return vld1_u16(values);
    std::uint16_t padded[4] = {};
    for (int i = 0; i < count; ++i) padded[i] = values[i];
    return vld1_u16(padded);
  }
  // The largest of many float16 scales. They are not negative, so their bit patterns are ordered as they are.
  struct ScaleMax {
    uint16x4_t lanes = vdup_n_u16(0);
    void add(const std::uint16_t* scales, int count) {
      for (int i = 0; i < count; i += 4) lanes = vmax_u16(lanes, load_halves(scales + i, count - i));
    }
    float value() const { return to_float(vmaxv_u16(lanes)); }
  };
  static float to_float(std::uint16_t half) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0);
  }
  static Int scaled_to_int(const std::uint16_t* scales, int count, float factor) {
    const float32x4_t values = vcvt_f32_f16(vreinterpret_f16_u16(load_halves(scales, count)));
    return vcvtnq_s32_f32(vmulq_n_f32(values, factor));
  }

  // Lane d of vector v holds byte 4 v + d: four bytes, at most 32 outputs, lie in one block.
  template <int Vector, int Fields>
  static int lane_blocks(int begin, int block) {
    return (begin + 4 * Vector * Fields) / block;
  }
  static Int spread(const std::int32_t* values, int lane_block) { return broadcast(values[lane_block]); }

  static Int load(const std::int32_t* values) { return vld1q_s32(values); }
  static Int load_bytes(const std::uint8_t* bytes) { return vreinterpretq_s32_u8(vld1q_u8(bytes)); }
  static Int load_bytes_tail(const std::uint8_t* bytes, int count) {
    std::uint8_t padded[16] = {};
    for (int i = 0; i < count; ++i) padded[i] = bytes[i];
    return load_bytes(padded);
  }
  static Int zip_bytes_low(Int a, Int b) {
    return vreinterpretq_s32_u8(vzip1q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static Int zip_bytes_high(Int a, Int b) {
    return vreinterpretq_s32_u8(vzip2q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static Int zip_pairs_low(Int a, Int b) {
    return vreinterpretq_s32_u16(vzip1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)));
  }
  static Int zip_pairs_high(Int a, Int b) {
    return vreinterpretq_s32_u16(vzip2q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)));
  }

  // The dot product takes signed bytes. The field at the top of the byte is moved down by half a byte; a field of
  // a whole byte is taken less 128, which the product then adds again.
  template <int Width, int Field>
  static constexpr int field_exponent() {
    return Width * Field - (Width < 8 && Width * (Field + 1) == 8 ? 4 : 0);
  }
  template <int Width, int Field>
  static Int field(Int bytes) {
    if constexpr (Width == 8) return veorq_s32(bytes, vdupq_n_s32(static_cast<std::int32_t>(0x80808080)));
    constexpr int kMask = ((1 << Width) - 1) << field_exponent<Width, Field>();
    const uint8x16_t raw = vreinterpretq_u8_s32(bytes);
    const uint8x16_t moved = field_exponent<Width, Field>() == Width * Field ? raw : vshrq_n_u8(raw, 4);
    return vreinterpretq_s32_u8(vandq_u8(moved, vdupq_n_u8(kMask)));
  }
  template <int Width, int Field>
  static Int dot(Int sum, Int field, Int coefficients) {
    const int8x16_t bytes = vreinterpretq_s8_s32(coefficients);
    sum = vdotq_s32(sum, vreinterpretq_s8_s32(field), bytes);
    if constexpr (Width == 8) {
      const int8x16_t half = vdupq_n_s8(64);
      sum = vdotq_s32(vdotq_s32(sum, half, bytes), half, bytes);
    }
    return sum;
  }
  static void add_scaled(float* sums, Int values, float factor) {
    vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vmulq_n_f32(vcvtq_f32_s32(values), factor)));
  }

  static void decode_channel(const PackedWeight& weight, std::int64_t c, int planes, Range outputs, float* values) {
    const std::uint16_t* scales = weight.block_scale + c * block_count(weight.n, weight.block);
    const int block_bits = __builtin_ctzll(static_cast<unsigned long long>(weight.block));
    const int bits = weight.widths.bits(planes);
    const float step = power_of_two(1 - bits);
    const float middle = power_of_two(-bits) - 1.0f;
    for (std::int64_t n = outputs.begin; n < outputs.end; ++n) {
      unsigned top = 0;
      for (int p = 0; p < planes; ++p) {
        const int width = weight.widths.width[p];
        const std::uint8_t* row = weight.plane[p] + c * plane_row_bytes(weight.n, width);
        const std::int64_t bit = n * width;
        top = (top << width) | ((static_cast<unsigned>(row[bit / 8]) >> (bit % 8)) & ((1u << width) - 1u));
      }
      // Exact: a level has at most 8 bits, so no product or sum rounds.
      values[n - outputs.begin] = to_float(scales[n >> block_bits]) * (static_cast<float>(top) * step + middle);
    }
  }

  static void scale_and_store(const float* values, const float* row_scale, float gain, std::int64_t count, Dtype dtype,
                              void* out) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float scaled = values[i] * gain * row_scale[i];
      switch (dtype) {
        case Dtype::f32: static_cast<float*>(out)[i] = scaled; break;
        case Dtype::f16:
          static_cast<std::uint16_t*>(out)[i] =
              vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(scaled))), 0);
          break;
        case Dtype::bf16: {  // weights are finite: ties to even is an addition
          const std::uint32_t pattern = __builtin_bit_cast(std::uint32_t, scaled);
          static_cast<std::uint16_t*>(out)[i] =
              static_cast<std::uint16_t>((pattern + 0x7fffu + ((pattern >> 16) & 1u)) >> 16);
          break;
        }
      }
    }
  }
};

}  // namespace

Kernels neon_kernels() { return {VectorKernel<Neon>::sum_channels, Neon::decode_channel, Neon::scale_and_store}; }

}  // namespace grinqh::cpu
