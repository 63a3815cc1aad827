// Conversions between float32 and the 16-bit formats, and loads and stores by Dtype.
#pragma once
#include <bit>
#include <cstdint>

#include "grinqh/types.h"

namespace grinqh {

inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  std::uint32_t bits = static_cast<std::uint32_t>(h & 0x7fffu) << 13;
  // The product moves the exponent's bias from 15 to 127 and makes subnormals normal.
  bits = std::bit_cast<std::uint32_t>(std::bit_cast<float>(bits) * 0x1p112f);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return std::bit_cast<float>(bits | sign);
}

// Rounds to nearest, ties to even; overflow gives infinity.
inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns and rounds a subnormal's mantissa
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

inline float bfloat16_to_float(std::uint16_t b) { return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16); }

inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_float(const void* data, std::int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return half_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case Dtype::bf16: return bfloat16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case Dtype::f32: break;
  }
  return static_cast<const float*>(data)[index];
}

inline void store_float(void* data, std::int64_t index, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f16: static_cast<std::uint16_t*>(data)[index] = float_to_half(value); return;
    case Dtype::bf16: static_cast<std::uint16_t*>(data)[index] = float_to_bfloat16(value); return;
    case Dtype::f32: break;
  }
  static_cast<float*>(data)[index] = value;
}

}  // namespace grinqh
