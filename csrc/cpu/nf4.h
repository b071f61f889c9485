// The values of a block of a 4-bit weight, bit for bit those of lora_kernels/nf4/weight.py: equations 7 and 8, each product and sum
// rounded to float by itself, which needs -ffp-contract=off, then W once to its dtype. A block has 16 different ones.
#pragma once
#include <cstdint>

#include "cpu.h"
#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && X86_64_LEVEL != 1 && X86_64_LEVEL != 3
#define HAVE_AVX512  // and the compiler can shuffle by a vector
#endif

namespace lora_kernels::cpu {

constexpr int CODES = 16;
constexpr int NESTED_BLOCK = 256;  // blocks that share one nested absmax

template <typename T>
INLINE const T* pointer(Address address) {
  return reinterpret_cast<const T*>(address);
}

INLINE float absmax_of(const Weight& w, std::int64_t block) {
  if (w.nested_absmax == 0) return pointer<float>(w.absmax)[block];
  const float entry = pointer<float>(w.nested_map)[pointer<std::uint8_t>(w.absmax)[block]];
  return entry * pointer<float>(w.nested_absmax)[block / NESTED_BLOCK] + *pointer<float>(w.nested_offset);
}

template <typename T>
INLINE void values_of_block(T (&value)[CODES], const Weight& w, float absmax) {
#pragma GCC unroll 1  // unrolled before it is vectorised, bfloat16 takes twice as long (GCC 12)
  for (int code = 0; code < CODES; ++code) round_to(value[code], pointer<float>(w.values)[code] * absmax);
}

// The same of the blocks first : last, rounded to `type` and back, for callers that are compiled to round a product and a sum once.
void values_of_blocks(float (*value)[CODES], const Weight& w, std::int64_t first, std::int64_t last, Rows::Type type);

}  // namespace lora_kernels::cpu
