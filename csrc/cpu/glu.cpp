// a = act(e) * u, de = da * u * act'(e), du = da * act(e); without e: a = act(u), du = da * act'(u). One pass over rows of float,
// bfloat16 or half: a tile at a time is read, computed in float and rounded once, so that de and du may lie where da did.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum rounded once: fewer instructions, and no bits are promised here
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "mask.h"
#include "rows.h"

namespace lora_kernels::cpu {
namespace {

constexpr int TILE = 64;                   // elements that are computed side by side
constexpr std::int64_t SEGMENT = 1 << 12;  // elements of a row that a thread takes at a time

// ---- the functions, without a branch, so that the compiler computes many at a time ----

// e^v; infinity above 88.73, NaN for NaN. Cephes' polynomial.
INLINE float exponential(float v) {
  constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, which its low bits hold
  v = v < -104.0f ? -104.0f : v;        // e^-104 rounds to 0, e^89 to infinity
  v = v > 89.0f ? 89.0f : v;
  const float shifted = v * LOG2E + ROUND, n = shifted - ROUND;
  const float r = v - n * LN2_HIGH - n * LN2_LOW;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n from -150 to 128 has no float of its own.
  const std::uint32_t bits = bits_of<std::uint32_t>(shifted) - bits_of<std::uint32_t>(ROUND);
  const std::uint32_t half = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 1);
  return power * bits_of<float>((half + 127) << 23) * bits_of<float>((bits - half + 127) << 23);
}

// s = 1 / (1 + e^-v), and rest = 1 - s, which where s is near 1 is no difference: that would have lost its digits.
struct Sigmoid {
  float s, rest;
  INLINE explicit Sigmoid(float v) {
    const float t = exponential(-v);
    s = 1.0f / (1.0f + t);
    rest = v > 0.0f ? t * s : 1.0f - s;
  }
};

// Phi(v) = (1 + erf(v / sqrt 2)) / 2. Polynomials: N. Juffa's for erff.
INLINE float normal_cdf(float v) {
  const float z = v * 0.707106781f, t = std::fabs(z), s = z * z;
  float small = -5.96761703e-4f;
  small = small * s + 4.99119423e-3f;
  small = small * s - 2.67681349e-2f;
  small = small * s + 1.12819925e-1f;
  small = small * s - 3.76125336e-1f;
  small = small * s + 1.28379166e-1f;
  small = small * z + z;  // erf(z) up to 0.93
  float large = (-1.72853470e-5f * t + 3.83197126e-4f) * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  large = large * t - 1.06777877e-1f;
  large = large * t - 6.34846687e-1f;
  large = large * t - 1.28717512e-1f;
  const float tail = 0.5f * exponential(large * t - t);  // (1 - erf(t)) / 2 above
  const float outer = z < 0.0f ? tail : 1.0f - tail;
  return t > 0.927734375f ? outer : 0.5f + 0.5f * small;
}

struct Silu {
  static INLINE float value(float v) { return v * Sigmoid(v).s; }
  static INLINE float both(float v, float& slope) {
    const Sigmoid of(v);
    slope = of.s * (1.0f + v * of.rest);
    return v * of.s;
  }
};

struct Gelu {
  static INLINE float value(float v) { return v * normal_cdf(v); }
  static INLINE float both(float v, float& slope) {
    const float cdf = normal_cdf(v);
    slope = cdf + v * (0.398942280f * exponential(-0.5f * v * v));
    return v * cdf;
  }
};

// (1 + tanh(z)) / 2 is the sigmoid of 2 z: no digits are lost where tanh is near -1.
struct GeluTanh {
  static constexpr float TWO_BETA = 1.59576912f, KAPPA = 0.044715f;  // 2 * sqrt(2 / pi)
  static INLINE float value(float v) { return v * Sigmoid(TWO_BETA * (v + KAPPA * v * v * v)).s; }
  static INLINE float both(float v, float& slope) {
    const Sigmoid of(TWO_BETA * (v + KAPPA * v * v * v));
    slope = of.s + v * (of.s * of.rest) * (TWO_BETA * (1.0f + 3.0f * KAPPA * v * v));
    return v * of.s;
  }
};

struct Relu2 {
  static INLINE float value(float v) {
    const float kept = v < 0.0f ? 0.0f : v;
    return kept * kept;
  }
  static INLINE float both(float v, float& slope) {
    const float kept = v < 0.0f ? 0.0f : v;
    slope = 2.0f * kept;
    return kept * kept;
  }
};

// ---- tiles ----

INLINE void read(float (&tile)[TILE], const Rows& rows, std::int64_t row, std::int64_t column, std::int64_t count) {
  if (count == TILE) return read_row(tile, rows, row, column, TILE);
  for (int i = 0; i < TILE; ++i) tile[i] = 0.0f;
  read_row(tile, rows, row, column, count);
}

INLINE void write(const float (&tile)[TILE], const Rows& rows, std::int64_t row, std::int64_t column, std::int64_t count) {
  if (count == TILE) return write_row(tile, rows, row, column, TILE);
  write_row(tile, rows, row, column, count);
}

template <typename Act>
INLINE void forward_part(const Glu& t, std::int64_t row, std::int64_t first, std::int64_t last) {
  float e[TILE], u[TILE];
  for (; first < last; first += TILE) {
    const std::int64_t count = std::min<std::int64_t>(TILE, last - first);
    read(u, t.u, row, first, count);
    if (t.e.address) {
      read(e, t.e, row, first, count);
      for (int i = 0; i < TILE; ++i) u[i] *= Act::value(e[i]);
    } else {
      for (int i = 0; i < TILE; ++i) u[i] = Act::value(u[i]);
    }
    write(u, t.a, row, first, count);
  }
}

template <typename Act>
INLINE void backward_part(const Glu& t, std::int64_t row, std::int64_t first, std::int64_t last) {
  float a[TILE], e[TILE], u[TILE], slope;
  for (; first < last; first += TILE) {
    const std::int64_t count = std::min<std::int64_t>(TILE, last - first);
    read(a, t.a, row, first, count);
    read(u, t.u, row, first, count);
    if (t.e.address) {
      read(e, t.e, row, first, count);
      for (int i = 0; i < TILE; ++i) {
        const float act = Act::both(e[i], slope);
        e[i] = a[i] * u[i] * slope;
        u[i] = a[i] * act;
      }
      write(e, t.de, row, first, count);
    } else {
      for (int i = 0; i < TILE; ++i) {
        Act::both(u[i], slope);
        u[i] = a[i] * slope;
      }
    }
    write(u, t.du, row, first, count);
  }
}

#define PARTS_OF(Act)                                                                                            \
  FOR_EACH_CPU void forward_##Act(const Glu& t, std::int64_t row, std::int64_t first, std::int64_t last) {  \
    forward_part<Act>(t, row, first, last);                                                                      \
  }                                                                                                              \
  FOR_EACH_CPU void backward_##Act(const Glu& t, std::int64_t row, std::int64_t first, std::int64_t last) { \
    backward_part<Act>(t, row, first, last);                                                                     \
  }
PARTS_OF(Silu)
PARTS_OF(Gelu)
PARTS_OF(GeluTanh)
PARTS_OF(Relu2)

template <typename Part>
void for_each_part(const Glu& t, int threads, const Part& part) {
  const std::int64_t per_row = (t.columns + SEGMENT - 1) / SEGMENT;
#pragma omp parallel for num_threads(threads) if (t.rows * t.columns > SEGMENT)
  for (std::int64_t i = 0; i < t.rows * per_row; ++i) {
    const std::int64_t first = i % per_row * SEGMENT;
    part(t, i / per_row, first, std::min(t.columns, first + SEGMENT));
  }
}

std::invalid_argument unknown(const std::string& activation) {
  return std::invalid_argument("activation: got " + activation + ", expected silu, gelu, gelu_tanh or relu2");
}

}  // namespace

void glu_forward(const Glu& t, const std::string& activation, int threads) {
  if (activation == "silu") return for_each_part(t, threads, forward_Silu);
  if (activation == "gelu") return for_each_part(t, threads, forward_Gelu);
  if (activation == "gelu_tanh") return for_each_part(t, threads, forward_GeluTanh);
  if (activation == "relu2") return for_each_part(t, threads, forward_Relu2);
  throw unknown(activation);
}

void glu_backward(const Glu& t, const std::string& activation, int threads) {
  if (activation == "silu") return for_each_part(t, threads, backward_Silu);
  if (activation == "gelu") return for_each_part(t, threads, backward_Gelu);
  if (activation == "gelu_tanh") return for_each_part(t, threads, backward_GeluTanh);
  if (activation == "relu2") return for_each_part(t, threads, backward_Relu2);
  throw unknown(activation);
}

}  // namespace lora_kernels::cpu
