// Numbers of 16 bits, and a float rounded once to any type, ties to even: what PyTorch's conversions give.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef INLINE
#define INLINE inline __attribute__((always_inline))
#endif

namespace lora_kernels::cpu {

template <typename To, typename From>
INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(To));
  return bits;
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

INLINE void round_to(double& out, double value) { out = value; }
INLINE void round_to(float& out, float value) { out = value; }

INLINE void round_to(BFloat16& out, float value) {
  const auto bits = bits_of<std::uint32_t>(value), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // ties to even
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  out.bits = static_cast<std::uint16_t>(nan ? 0x7FC0 : rounded);
}

INLINE void round_to(Half& out, float value) {
  const auto bits = bits_of<std::uint32_t>(value), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
  std::uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;  // NaN
  } else if (magnitude >= 0x477FF000) {
    half = 0x7C00;  // 65520, halfway between the largest half and the next power of two
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 halves are 2^-24 apart, as floats are from 0.5 on: the sum rounds, and its low bits count those steps.
    half = bits_of<std::uint32_t>(std::fabs(value) + 0.5f) - 0x3F000000;
  } else {
    half = (magnitude + 0xFFF + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13;  // ties to even
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

INLINE float as_float(float value) { return value; }
INLINE float as_float(BFloat16 value) { return bits_of<float>(std::uint32_t{value.bits} << 16); }
INLINE float as_float(Half value) {
  const std::uint32_t magnitude = (value.bits & 0x7FFFu) << 13, sign = (value.bits & 0x8000u) << 16;
  const float finite = bits_of<float>(magnitude) * 0x1p112f;  // its exponent, subnormals' too, from half's bias to float's
  const std::uint32_t bits = magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : bits_of<std::uint32_t>(finite);
  return bits_of<float>(bits | sign);
}

// round_to and as_float without the bits between: vectors of floats alone.
INLINE float rounded(float value, float) { return value; }
INLINE float rounded(float value, BFloat16) {
  const auto bits = bits_of<std::uint32_t>(value), sum = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  return bits_of<float>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits : sum);
}
INLINE float rounded(float value, Half) {
  // A float whose last bit is worth that of the half below `value`: adding it rounds, and what it was is taken off again.
  const std::uint32_t exponent = bits_of<std::uint32_t>(value) & 0x7F800000, least = (127 - 14) << 23, most = (127 + 16) << 23;
  const float large = bits_of<float>(exponent < least ? least : exponent > most ? most : exponent) * 0x1.8p13f;
  const float magnitude = (std::fabs(value) + large) - large;
  return std::copysign(magnitude > 65504.0f ? HUGE_VALF : magnitude, value);
}

}  // namespace lora_kernels::cpu
