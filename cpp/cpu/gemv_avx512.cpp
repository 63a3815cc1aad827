// AVX-512 with VNNI (integer dot products) and VBMI (byte permutations across a vector).
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_epi32 (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "gemv_vector.h"

namespace grinqh::cpu {
namespace {

struct Avx512 {
  using Int = __m512i;
  static constexpr int kLanes = 16;

  static Int zero() { return _mm512_setzero_si512(); }
  static Int broadcast(std::int32_t value) { return _mm512_set1_epi32(value); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
  template <int Bits>
  static Int shift_left(Int a) {
    return _mm512_slli_epi32(a, Bits);
  }
  template <int Bits>
  static Int shift_right(Int a) {
    return _mm512_srai_epi32(a, Bits);
  }
  // The low byte of each lane, moved to a place in the lane.
  template <int Place>
  static Int place_byte(Int a) {
    return _mm512_slli_epi32(_mm512_and_si512(a, _mm512_set1_epi32(0xff)), 8 * Place);
  }
  static void store(std::int32_t* out, Int a) { _mm512_storeu_si512(out, a); }

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

  // The largest of many float16 scales. They are not negative, so their bit patterns are ordered as they are.
  struct ScaleMax {
    __m256i lanes = _mm256_setzero_si256();
    void add(const std::uint16_t* scales, int count) {
      for (int i = 0; i < count; i += 16) {
        lanes = _mm256_max_epu16(lanes, _mm256_maskz_loadu_epi16(first(count - i < 16 ? count - i : 16), scales + i));
      }
    }
    float value() const {
      const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
      const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));  // of the complements
      return to_float(static_cast<std::uint16_t>(~_mm_extract_epi16(smallest, 0)));
    }
  };
  static float to_float(std::uint16_t half) { return _cvtsh_ss(half); }
  static Int scaled_to_int(const std::uint16_t* scales, int count, float factor) {
    const __m512 values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), scales));
    return _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(factor)));
  }

  // Lane 4 k + d of vector v holds byte 16 k + 4 v + d.
  template <int Vector, int Fields>
  static Int lane_blocks(int begin, int block) {
    const Int byte = _mm512_set_epi32(51, 50, 49, 48, 35, 34, 33, 32, 19, 18, 17, 16, 3, 2, 1, 0);
    const Int output = _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(4 * Vector)),
                                         static_cast<unsigned>(__builtin_ctz(Fields)));
    return _mm512_srl_epi32(_mm512_add_epi32(output, _mm512_set1_epi32(begin)),
                            _mm_cvtsi32_si128(__builtin_ctz(static_cast<unsigned>(block))));
  }
  static Int spread(const std::int32_t* values, Int lane_block) {
    return _mm512_permutexvar_epi32(lane_block, _mm512_loadu_si512(values));
  }

  static Int load(const std::int32_t* values) { return _mm512_load_si512(values); }
  static Int load_bytes(const std::uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static Int load_bytes_tail(const std::uint8_t* bytes, int count) {
    return _mm512_maskz_loadu_epi8((std::uint64_t{1} << count) - 1u, bytes);
  }
  static Int zip_bytes_low(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static Int zip_bytes_high(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static Int zip_pairs_low(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static Int zip_pairs_high(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }

  // A field stays where it lies in the byte.
  template <int Width, int Field>
  static constexpr int field_exponent() {
    return Width * Field;
  }
  template <int Width, int Field>
  static Int field(Int bytes) {
    if constexpr (Width == 8) return bytes;
    constexpr int kMask = ((1 << Width) - 1) << (Width * Field);
    return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(kMask)));
  }
  template <int Width, int Field>
  static Int dot(Int sum, Int field, Int coefficients) {
    return _mm512_dpbusd_epi32(sum, field, coefficients);
  }
  static void add_scaled(float* sums, Int values, float factor) {
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(values), _mm512_set1_ps(factor));
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), product));
  }

  static __mmask16 first_bytes(std::int64_t count) { return first(static_cast<int>(count)); }

  // 64 codes of a plane, one a byte; zeros past the end of the row unless it is Full.
  template <int Width, bool Full>
  static Int load_codes(const std::uint8_t* bytes, std::int64_t left) {
    // Eight codes to a qword, whose bits are then cut into its eight bytes.
    Int spread;
    if constexpr (Width == 8) {
      return Full ? load_bytes(bytes)
                  : _mm512_maskz_loadu_epi8(left < 64 ? (std::uint64_t{1} << left) - 1u : ~std::uint64_t{0}, bytes);
    } else if constexpr (Width == 4) {
      const auto mask = static_cast<__mmask32>(left < 32 ? (1u << left) - 1u : ~0u);
      spread = _mm512_cvtepu32_epi64(Full ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes))
                                          : _mm256_maskz_loadu_epi8(mask, bytes));
    } else if constexpr (Width == 2) {
      spread = _mm512_cvtepu16_epi64(Full ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))
                                          : _mm_maskz_loadu_epi8(first_bytes(left < 16 ? left : 16), bytes));
    } else {
      spread = _mm512_cvtepu8_epi64(Full ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))
                                         : _mm_maskz_loadu_epi8(first_bytes(left < 8 ? left : 8), bytes));
    }
    const Int starts = _mm512_set1_epi64(0x0706050403020100 * Width);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(starts, spread),
                            _mm512_set1_epi8(static_cast<char>((1 << Width) - 1)));
  }
  template <int Width, bool Full>
  static Int append_codes(Int top, const std::uint8_t* bytes, std::int64_t left) {
    if constexpr (Width == 8) return load_codes<8, Full>(bytes, left);
    return _mm512_or_si512(_mm512_slli_epi16(top, Width), load_codes<Width, Full>(bytes, left));
  }

  // The top bits of 64 codes from output n on.
  template <bool Full>
  static Int top_bits(const PackedWeight& weight, const std::uint8_t* const* row, int planes, std::int64_t n) {
    Int top = zero();
    for (int p = 0; p < planes; ++p) {
      const int width = weight.widths.width[p];
      const std::int64_t at = n * width / 8;
      const std::int64_t left = plane_row_bytes(weight.n, width) - at;
      switch (width) {
        case 1: top = append_codes<1, Full>(top, row[p] + at, left); break;
        case 2: top = append_codes<2, Full>(top, row[p] + at, left); break;
        case 4: top = append_codes<4, Full>(top, row[p] + at, left); break;
        default: top = append_codes<8, Full>(top, row[p] + at, left); break;
      }
    }
    return top;
  }

  static void decode_channel(const PackedWeight& weight, std::int64_t c, int planes, Range outputs, float* values) {
    const std::uint16_t* scales = weight.block_scale + c * block_count(weight.n, weight.block);
    const int block_bits = __builtin_ctzll(static_cast<unsigned long long>(weight.block));
    const int bits = weight.widths.bits(planes);
    const __m512 step = _mm512_set1_ps(power_of_two(1 - bits));
    const __m512 middle = _mm512_set1_ps(power_of_two(-bits) - 1.0f);
    const std::uint8_t* row[kMaxPlanes];
    for (int p = 0; p < planes; ++p) row[p] = weight.plane[p] + c * plane_row_bytes(weight.n, weight.widths.width[p]);
    // Exact but for the last product: a level has at most 8 bits.
    const auto sixteen = [&](const std::uint8_t* codes, std::int64_t n) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(codes));
      const __m512 level = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), step), middle);
      return _mm512_mul_ps(level, _mm512_set1_ps(to_float(scales[n >> block_bits])));
    };
    alignas(64) std::uint8_t codes[64];
    std::int64_t n = outputs.begin;
    for (; n + 64 <= outputs.end; n += 64) {
      _mm512_store_si512(codes, top_bits<true>(weight, row, planes, n));
      for (int i = 0; i < 64; i += 16) _mm512_storeu_ps(values + (n + i - outputs.begin), sixteen(codes + i, n + i));
    }
    if (n == outputs.end) return;
    _mm512_store_si512(codes, top_bits<false>(weight, row, planes, n));
    for (int i = 0; n + i < outputs.end; i += 16) {
      const std::int64_t left = outputs.end - n - i;
      _mm512_mask_storeu_ps(values + (n + i - outputs.begin), first_bytes(left < 16 ? left : 16),
                            sixteen(codes + i, n + i));
    }
  }

  static void scale_and_store(const float* values, const float* row_scale, float gain, std::int64_t count, Dtype dtype,
                              void* out) {
    for (std::int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = first_bytes(count - i < 16 ? count - i : 16);
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + i), _mm512_set1_ps(gain)),
                                          _mm512_maskz_loadu_ps(mask, row_scale + i));
      switch (dtype) {
        case Dtype::f32: _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, scaled); break;
        case Dtype::f16:
          _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, mask,
                                   _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
          break;
        case Dtype::bf16: {  // weights are finite: ties to even is an addition
          const Int pattern = _mm512_castps_si512(scaled);
          const Int odd = _mm512_and_si512(_mm512_srli_epi32(pattern, 16), _mm512_set1_epi32(1));
          const Int rounded = _mm512_add_epi32(_mm512_add_epi32(pattern, _mm512_set1_epi32(0x7fff)), odd);
          _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, mask,
                                   _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
          break;
        }
      }
    }
  }
};

}  // namespace

Kernels avx512_kernels() {
  return {VectorKernel<Avx512>::sum_channels, Avx512::decode_channel, Avx512::scale_and_store};
}

}  // namespace grinqh::cpu
