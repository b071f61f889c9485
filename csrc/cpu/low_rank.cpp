// The low-rank part of equations 1 to 6 (lora_kernels/reference/linear.py) where it is so small that PyTorch's way to each product
// takes longer than the product: each direction is one call, on one thread. All matrices have adjacent rows.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "mask.h"

namespace lora_kernels::cpu {
namespace {

constexpr int PARTS = 8;  // sums of a dot product side by side

template <typename T>
INLINE T total(const T (&parts)[PARTS]) {
  const T a = parts[0] + parts[4], b = parts[1] + parts[5], c = parts[2] + parts[6], d = parts[3] + parts[7];
  return (a + c) + (b + d);
}

// `COUNT` elements of out[i, j] (+)= s * sum over k of a[i, k] * b[j, k], from j = first: independent sums hide latencies.
template <int COUNT, bool ADD, typename T>
INLINE void dot_products(T* out, const T* a, const T* b, std::int64_t inner, T s) {
  typedef T Vector __attribute__((vector_size(PARTS * sizeof(T))));
  Vector sums[COUNT] = {};
  std::int64_t k = 0;
  for (; k + PARTS <= inner; k += PARTS) {
    Vector u, v;
    std::memcpy(&u, a + k, sizeof(u));
    for (int j = 0; j < COUNT; ++j) {
      std::memcpy(&v, b + j * inner + k, sizeof(v));
      sums[j] += u * v;
    }
  }
  for (int j = 0; j < COUNT; ++j) {
    T parts[PARTS], rest = 0;
    std::memcpy(parts, &sums[j], sizeof(parts));
    for (std::int64_t l = k; l < inner; ++l) rest += a[l] * b[j * inner + l];
    const T sum = s * (total(parts) + rest);
    out[j] = ADD ? out[j] + sum : sum;
  }
}

// out[i, j] (+)= s * sum over k of a[i, k] * b[j, k]
template <bool ADD, typename T>
INLINE void rows_by_rows(T* out, const T* a, const T* b, std::int64_t rows, std::int64_t columns, std::int64_t inner, T s) {
  for (std::int64_t i = 0; i < rows; ++i) {
    std::int64_t j = 0;
    for (; j + 4 <= columns; j += 4) dot_products<4, ADD>(out + i * columns + j, a + i * inner, b + j * inner, inner, s);
    for (; j < columns; ++j) dot_products<1, ADD>(out + i * columns + j, a + i * inner, b + j * inner, inner, s);
  }
}

// a[i * a_row + k * a_step] is its element i, k: a matrix or its transpose.
template <typename T>
struct Factor {
  const T* a;
  std::int64_t a_row, a_step;
};

// WIDTH columns of out[i, j] = s * sum over k of a[i, k] * b[k, j], from `first`.
template <int WIDTH, typename T>
INLINE void column_block(T* out, Factor<T> a, const T* b, std::int64_t rows, std::int64_t columns, std::int64_t inner, T s,
                         std::int64_t first) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T sums[WIDTH] = {};
    for (std::int64_t k = 0; k < inner; ++k) {
      const T factor = a.a[i * a.a_row + k * a.a_step];
      for (int j = 0; j < WIDTH; ++j) sums[j] += factor * b[k * columns + first + j];
    }
    for (int j = 0; j < WIDTH; ++j) out[i * columns + first + j] = s * sums[j];
  }
}

// out[i, j] = s * sum over k of a[i, k] * b[k, j]
template <typename T>
INLINE void by_columns(T* out, Factor<T> a, const T* b, std::int64_t rows, std::int64_t columns, std::int64_t inner, T s) {
  std::int64_t first = 0;
  for (; first + 32 <= columns; first += 32) column_block<32>(out, a, b, rows, columns, inner, s, first);
  for (; first + 4 <= columns; first += 4) column_block<4>(out, a, b, rows, columns, inner, s, first);
  for (; first < columns; ++first) column_block<1>(out, a, b, rows, columns, inner, s, first);
}

template <typename T>
struct Term {
  const T *x, *A, *B;
  std::int64_t M, K, N, R;
  T s, scale;  // scale: of the values that dropout keeps
  Mask mask;
};

// drop(v), or undrop(v), which is the same; v itself without dropout.
template <typename T>
INLINE const T* dropped(std::vector<T>& room, const T* v, const Term<T>& term) {
  if (term.mask.threshold == 0) return v;
  room.resize(term.M * term.K);
  for (std::int64_t i = 0; i < term.M; ++i)
    drop_row(room.data() + i * term.K, v + i * term.K, term.scale, term.K, static_cast<std::uint32_t>(i), term.mask);
  return room.data();
}

template <typename T>
INLINE void forward(const Term<T>& term, T* y, T* h) {
  const auto [x, A, B, M, K, N, R, s, scale, mask] = term;
  std::vector<T> room;
  rows_by_rows<false>(h, dropped(room, x, term), A, M, R, K, T{1});  // 1
  rows_by_rows<true>(y, h, B, M, N, R, s);                           // 2
}

template <typename T>
INLINE void backward(const Term<T>& term, const T* W, const T* dy, const T* h, T* dx, T* dA, T* dB, T* dc) {
  const auto [x, A, B, M, K, N, R, s, scale, mask] = term;
  std::vector<T> g, room;
  if (dx || dA) {
    g.resize(M * R);
    by_columns(g.data(), {dy, N, 1}, B, M, R, N, s);  // 3
  }
  if (dx) {
    std::vector<T> low_rank(M * K);
    if (W) by_columns(dx, {dy, N, 1}, W, M, K, N, T{1});
    by_columns(low_rank.data(), {g.data(), R, 1}, A, M, K, R, T{1});
    const T* undropped = dropped(room, low_rank.data(), term);
    for (std::int64_t i = 0; i < M * K; ++i) dx[i] += undropped[i];  // 4
  }
  if (dA) by_columns(dA, {g.data(), 1, R}, dropped(room, x, term), R, K, M, T{1});  // 5
  if (dB) by_columns(dB, {dy, 1, N}, h, N, R, M, s);                                // 6
  if (dc)
    for (std::int64_t j = 0; j < N; ++j) {
      dc[j] = 0;
      for (std::int64_t i = 0; i < M; ++i) dc[j] += dy[i * N + j];  // 6
    }
}

#define LOW_RANK(T, forward_of, backward_of)                                                                               \
  FOR_EACH_CPU void forward_of(const Term<T>& term, T* y, T* h) { forward(term, y, h); }                                   \
  FOR_EACH_CPU void backward_of(const Term<T>& term, const T* W, const T* dy, const T* h, T* dx, T* dA, T* dB, T* dc) { \
    backward(term, W, dy, h, dx, dA, dB, dc);                                                                              \
  }
LOW_RANK(float, forward_of_floats, backward_of_floats)
LOW_RANK(double, forward_of_doubles, backward_of_doubles)

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
Term<T> as(const LowRank& l) {
  const auto t = [](Address address) { return at<const T>(address); };
  const auto n = [](double number) { return static_cast<T>(number); };
  return {t(l.x), t(l.A), t(l.B), l.M, l.K, l.N, l.R, n(l.s), n(l.scale), mask_of(l.threshold, l.seed, l.offset)};
}

}  // namespace

void low_rank_forward(const LowRank& l, Address y, Address h) {
  if (l.itemsize == sizeof(float)) return forward_of_floats(as<float>(l), at<float>(y), at<float>(h));
  if (l.itemsize == sizeof(double)) return forward_of_doubles(as<double>(l), at<double>(y), at<double>(h));
  throw std::invalid_argument("low_rank_forward: got elements of " + std::to_string(l.itemsize) + " bytes, expected 4 or 8");
}

void low_rank_backward(const LowRank& l, Address W, Address dy, Address h, Address dx, Address dA, Address dB, Address dc) {
  const auto run = [&](auto* backward, auto term, auto one) {
    using T = decltype(one);
    backward(term, at<T>(W), at<T>(dy), at<T>(h), at<T>(dx), at<T>(dA), at<T>(dB), at<T>(dc));
  };
  if (l.itemsize == sizeof(float)) return run(&backward_of_floats, as<float>(l), 1.0f);
  if (l.itemsize == sizeof(double)) return run(&backward_of_doubles, as<double>(l), 1.0);
  throw std::invalid_argument("low_rank_backward: got elements of " + std::to_string(l.itemsize) + " bytes, expected 4 or 8");
}

}  // namespace lora_kernels::cpu
