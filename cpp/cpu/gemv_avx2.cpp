// AVX2 with FMA's contemporaries: F16C for the scales, BMI2 to spread bits.
#include <immintrin.h>

#include "gemv_vector.h"

namespace grinqh::cpu {
namespace {

struct Avx2 {
  using Int = __m256i;
  static constexpr int kLanes = 8;

  static Int zero() { return _mm256_setzero_si256(); }
  static Int broadcast(std::int32_t value) { return _mm256_set1_epi32(value); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
  template <int Bits>
  static Int shift_left(Int a) {
    return _mm256_slli_epi32(a, Bits);
  }
  template <int Bits>
  static Int shift_right(Int a) {
    return _mm256_srai_epi32(a, Bits);
  }
  // The low byte of each lane, moved to a place in the lane.
  template <int Place>
  static Int place_byte(Int a) {
    return _mm256_slli_epi32(_mm256_and_si256(a, _mm256_set1_epi32(0xff)), 8 * Place);
  }
  static void store(std::int32_t* out, Int a) { _mm256_storeu_si256(reinterpret_cast<Int*>(out), a); }

  // Up to eight float16 values, zeros after them.
  static __m128i load_halves(const std::uint16_t* values, int count) {
    if (count >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    alignas(16) std::uint16_t padded[8] = {};
    for (int i = 0; i < count; ++i) padded[i] = values[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(padded));
  }
  // The largest of many float16 scales. They are not negative, so their bit patterns are ordered as they are.
  struct ScaleMax {
    __m128i lanes = _mm_setzero_si128();
    void add(const std::uint16_t* scales, int count) {
      for (int i = 0; i < count; i += 8) lanes = _mm_max_epu16(lanes, load_halves(scales + i, count - i));
    }
    float value() const {
      const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(lanes, _mm_set1_epi16(-1)));  // of the complements
      return to_float(static_cast<std::uint16_t>(~_mm_extract_epi16(smallest, 0)));
    }
  };
  static float to_float(std::uint16_t half) { return _cvtsh_ss(half); }
  static Int scaled_to_int(const std::uint16_t* scales, int count, float factor) {
    const __m256 values = _mm256_cvtph_ps(load_halves(scales, count));
    return _mm256_cvtps_epi32(_mm256_mul_ps(values, _mm256_set1_ps(factor)));
  }

  // Lane 4 k + d of vector v holds byte 16 k + 4 v + d.
  template <int Vector, int Fields>
  static Int lane_blocks(int begin, int block) {
    const Int byte = _mm256_set_epi32(19, 18, 17, 16, 3, 2, 1, 0);
    const Int output = _mm256_slli_epi32(_mm256_add_epi32(byte, _mm256_set1_epi32(4 * Vector)), __builtin_ctz(Fields));
    return _mm256_srl_epi32(_mm256_add_epi32(output, _mm256_set1_epi32(begin)),
                            _mm_cvtsi32_si128(__builtin_ctz(static_cast<unsigned>(block))));
  }
  // A chunk is 256 outputs at most, 8 blocks: what one vector holds.
  static Int spread(const std::int32_t* values, Int lane_block) {
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const Int*>(values)), lane_block);
  }

  static Int load(const std::int32_t* values) { return _mm256_load_si256(reinterpret_cast<const Int*>(values)); }
  static Int load_bytes(const std::uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(bytes)); }
  static Int load_bytes_tail(const std::uint8_t* bytes, int count) {
    alignas(32) std::uint8_t padded[32] = {};
    for (int i = 0; i < count; ++i) padded[i] = bytes[i];
    return _mm256_load_si256(reinterpret_cast<const Int*>(padded));
  }
  static Int zip_bytes_low(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static Int zip_bytes_high(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static Int zip_pairs_low(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static Int zip_pairs_high(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }

  // The dot product adds pairs in 16 bits with saturation, so a field above 127 would not do. Wide fields at the
  // top of the byte are moved down by half a byte; a field of a whole byte takes another dot product.
  template <int Width, int Field>
  static constexpr bool moved_down() {
    return (Width == 2 || Width == 4) && Width * (Field + 1) == 8;
  }
  template <int Width, int Field>
  static constexpr int field_exponent() {
    return Width * Field - (moved_down<Width, Field>() ? 4 : 0);
  }
  template <int Width, int Field>
  static Int field(Int bytes) {
    if constexpr (Width == 8) return bytes;
    constexpr int kMask = ((1 << Width) - 1) << field_exponent<Width, Field>();
    const Int moved = moved_down<Width, Field>() ? _mm256_srli_epi16(bytes, 4) : bytes;
    return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(kMask)));
  }
  template <int Width, int Field>
  static Int dot(Int sum, Int field, Int coefficients) {
    if constexpr (Width == 8) {
      const Int even = _mm256_madd_epi16(_mm256_and_si256(field, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(coefficients, 8), 8));
      const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(field, 8), _mm256_srai_epi16(coefficients, 8));
      return add(sum, add(even, odd));
    } else {
      const Int pairs = _mm256_maddubs_epi16(field, coefficients);
      return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  static void add_scaled(float* sums, Int values, float factor) {
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(values), _mm256_set1_ps(factor));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), product));
  }

  // Eight codes of `width` bits as bytes. They begin at a byte: outputs come in multiples of eight.
  static std::uint64_t eight_codes(const std::uint8_t* bytes, std::int64_t left, int width) {
    std::uint64_t bits = 0;
    for (int i = 0; i < width && i < left; ++i) bits |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
    return _pdep_u64(bits, 0x0101010101010101u * ((1u << width) - 1u));
  }

  static void decode_channel(const PackedWeight& weight, std::int64_t c, int planes, Range outputs, float* values) {
    const std::uint16_t* scales = weight.block_scale + c * block_count(weight.n, weight.block);
    const int block_bits = __builtin_ctzll(static_cast<unsigned long long>(weight.block));
    const int bits = weight.widths.bits(planes);
    const __m256 step = _mm256_set1_ps(power_of_two(1 - bits));
    const __m256 middle = _mm256_set1_ps(power_of_two(-bits) - 1.0f);
    for (std::int64_t n = outputs.begin; n < outputs.end; n += 8) {
      std::uint64_t top = 0;
      for (int p = 0; p < planes; ++p) {
        const int width = weight.widths.width[p];
        const std::int64_t row_bytes = plane_row_bytes(weight.n, width);
        const std::int64_t byte = n * width / 8;
        top = (top << width) | eight_codes(weight.plane[p] + c * row_bytes + byte, row_bytes - byte, width);
      }
      const __m256 codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(top))));
      // Exact: a level has at most 8 bits, so no product or sum rounds.
      const __m256 level = _mm256_add_ps(_mm256_mul_ps(codes, step), middle);
      const __m256 scaled = _mm256_mul_ps(level, _mm256_set1_ps(to_float(scales[n >> block_bits])));
      alignas(32) float eight[8];
      _mm256_store_ps(eight, scaled);
      for (std::int64_t i = n; i < n + 8 && i < outputs.end; ++i) values[i - outputs.begin] = eight[i - n];
    }
  }

  static void store_eight(__m256 scaled, Dtype dtype, void* out) {
    switch (dtype) {
      case Dtype::f32: _mm256_storeu_ps(static_cast<float*>(out), scaled); return;
      case Dtype::f16:
        _mm_storeu_si128(static_cast<__m128i*>(out),
                         _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return;
      case Dtype::bf16: {  // weights are finite: ties to even is an addition
        const Int pattern = _mm256_castps_si256(scaled);
        const Int odd = _mm256_and_si256(_mm256_srli_epi32(pattern, 16), _mm256_set1_epi32(1));
        const Int rounded = _mm256_srli_epi32(add(add(pattern, _mm256_set1_epi32(0x7fff)), odd), 16);
        const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
        _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
        return;
      }
    }
  }

  static void scale_and_store(const float* values, const float* row_scale, float gain, std::int64_t count, Dtype dtype,
                              void* out) {
    const std::int64_t item = dtype == Dtype::f32 ? 4 : 2;
    char* bytes = static_cast<char*>(out);
    const auto eight = [&](const float* eight_values, const float* eight_scales) {
      return _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(eight_values), _mm256_set1_ps(gain)),
                           _mm256_loadu_ps(eight_scales));
    };
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) store_eight(eight(values + i, row_scale + i), dtype, bytes + i * item);
    if (i == count) return;
    float last_values[8] = {};
    float last_scales[8] = {};
    for (std::int64_t j = i; j < count; ++j) {
      last_values[j - i] = values[j];
      last_scales[j - i] = row_scale[j];
    }
    char last[32];
    store_eight(eight(last_values, last_scales), dtype, last);
    for (std::int64_t b = 0; b < (count - i) * item; ++b) bytes[i * item + b] = last[b];
  }
};

}  // namespace

Kernels avx2_kernels() { return {VectorKernel<Avx2>::sum_channels, Avx2::decode_channel, Avx2::scale_and_store}; }

}  // namespace grinqh::cpu
