// The low-rank part of equations 1 to 6 (lora_kernels/reference/linear.py): each direction is one pass over the rows of x, dy, y and
// dx, with one mask for all that needs it. PyTorch's way has a pass, and memory, for each product and mask. All matrices have
// adjacent rows.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum rounded once: half the instructions, and no bits are promised here
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "mask.h"
#include "products.h"

namespace lora_kernels::cpu {
namespace {

constexpr std::int64_t BLOCK = 32;    // rows that are computed together, so that what they read of A and B stays in cache
constexpr std::int64_t COLUMNS = 128;  // of a tile of such rows
constexpr std::int64_t CHUNK = 64;    // rows whose parts of dA, dB and dc are summed up first: for any number of threads the same
constexpr std::int64_t FEW = 1 << 16;  // multiplications that one thread computes before others have begun

template <typename T>
struct Term {
  const T* x;
  std::int64_t M, K, N, R, padded;  // padded: R to whole vectors
  T scale;                          // of the values that dropout keeps
  Mask mask;
  const T *A, *At;    // [R, K], [K, padded]
  const T *sB, *sBt;  // s * B: [N, padded], [R, N]
};

// What a thread computes in: rows of a tile.
template <typename T>
struct Room {
  std::uint16_t lanes[BLOCK * COLUMNS];
  T tile[BLOCK * COLUMNS], wide[BLOCK * COLUMNS];
};

// A tile as the products read it.
template <typename T>
struct Tile {
  const T* at;
  std::int64_t row;
};

// drop(in) of a tile whose lanes are drawn, in `out`; `in` itself without dropout.
template <typename T>
INLINE Tile<T> dropped(T* out, const std::uint16_t* lanes, const Term<T>& term, Tile<T> in, std::int64_t rows, std::int64_t width) {
  if (term.mask.threshold == 0) return in;
  const std::int32_t threshold = term.mask.threshold;
  const T scale = term.scale;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; ++j)
      out[i * COLUMNS + j] = in.at[i * in.row + j] * (lanes[i * COLUMNS + j] >= threshold ? scale : T{0});
  return {out, COLUMNS};
}

template <typename T>
INLINE void draw(std::uint16_t* lanes, const Term<T>& term, std::int64_t first, std::int64_t rows, std::int64_t k) {
  if (term.mask.threshold)
    draw_lanes(lanes, static_cast<std::uint32_t>(first), rows, static_cast<std::uint32_t>(k / LANES), COLUMNS / LANES, term.mask);
}

// Equations 1 and 2 of the rows first : first + rows.
template <typename T>
INLINE void forward(const Term<T>& term, T* y, T* h, std::int64_t first, std::int64_t rows) {
  const std::int64_t K = term.K, N = term.N, R = term.R, padded = term.padded;
  Room<T> room;
  std::vector<T> sums(rows * padded);
  for (std::int64_t k = 0; k < K; k += COLUMNS) {
    const std::int64_t width = std::min(COLUMNS, K - k);
    draw(room.lanes, term, first, rows, k);
    const auto v = dropped(room.tile, room.lanes, term, Tile<T>{term.x + first * K + k, K}, rows, width);
    combine(sums.data(), padded, rows, padded, Factor<T>{v.at, v.row, 1}, term.At + k * padded, padded, width);  // 1
  }
  for (std::int64_t i = 0; i < rows; ++i) std::copy_n(sums.data() + i * padded, R, h + (first + i) * R);
  combine(y + first * N, N, rows, N, Factor<T>{sums.data(), padded, 1}, term.sBt, N, R);  // 2
}

template <typename T>
struct Gradients {
  const T *W, *dy, *h;
  T *dx, *dA, *dBt, *dc;  // dA, dBt and dc: the sums over a chunk of rows; 0 for what is not wanted
};

// Equation 4 of a tile.
template <typename T>
INLINE void add_to_dx(const Term<T>& term, const Gradients<T>& to, Room<T>& room, const T* g, std::int64_t first, std::int64_t rows,
                      std::int64_t k, std::int64_t width) {
  const std::int64_t K = term.K, N = term.N;
  T* dx = to.dx + first * K + k;
  if (to.W) {
    for (std::int64_t i = 0; i < rows; ++i) std::fill_n(dx + i * K, width, T{0});
    combine(dx, K, rows, width, Factor<T>{to.dy + first * N, N, 1}, to.W + k, K, N);
  }
  const Factor<T> factor{g, term.padded, 1};
  if (term.mask.threshold == 0) return combine(dx, K, rows, width, factor, term.A + k, K, term.R);
  std::fill_n(room.wide, rows * COLUMNS, T{0});
  combine(room.wide, COLUMNS, rows, width, factor, term.A + k, K, term.R);
  const auto v = dropped(room.tile, room.lanes, term, Tile<T>{room.wide, COLUMNS}, rows, width);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; ++j) dx[i * K + j] += v.at[i * COLUMNS + j];
}

// Equations 3 to 6 of the rows first : first + rows.
template <typename T>
INLINE void backward(const Term<T>& term, const Gradients<T>& to, std::int64_t first, std::int64_t rows) {
  const std::int64_t K = term.K, N = term.N, R = term.R, padded = term.padded;
  const T* dy = to.dy + first * N;
  std::vector<T> g(to.dx || to.dA ? rows * padded : 0);
  for (std::int64_t n = 0; n < N; n += COLUMNS) {
    const std::int64_t width = std::min(COLUMNS, N - n);
    if (!g.empty()) combine(g.data(), padded, rows, padded, Factor<T>{dy + n, N, 1}, term.sB + n * padded, padded, width);  // 3
    if (to.dBt) combine(to.dBt + n, N, R, width, Factor<T>{to.h + first * R, 1, R}, dy + n, N, rows);                       // 6
    if (to.dc)
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = n; j < n + width; ++j) to.dc[j] += dy[i * N + j];  // 6
  }
  if (g.empty()) return;
  Room<T> room;
  for (std::int64_t k = 0; k < K; k += COLUMNS) {
    const std::int64_t width = std::min(COLUMNS, K - k);
    draw(room.lanes, term, first, rows, k);
    if (to.dx) add_to_dx(term, to, room, g.data(), first, rows, k, width);
    if (!to.dA) continue;
    const auto v = dropped(room.tile, room.lanes, term, Tile<T>{term.x + first * K + k, K}, rows, width);
    combine(to.dA + k, K, R, width, Factor<T>{g.data(), 1, padded}, v.at, v.row, rows);  // 5
  }
}

#define LOW_RANK(T, forward_of, backward_of)                                                                              \
  FOR_EACH_CPU void forward_of(const Term<T>& term, T* y, T* h, std::int64_t first, std::int64_t rows) {                  \
    forward(term, y, h, first, rows);                                                                                     \
  }                                                                                                                       \
  FOR_EACH_CPU void backward_of(const Term<T>& term, const Gradients<T>& to, std::int64_t first, std::int64_t rows) { \
    backward(term, to, first, rows);                                                                                      \
  }
LOW_RANK(float, forward_of_floats, backward_of_floats)
LOW_RANK(double, forward_of_doubles, backward_of_doubles)

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// to[columns, row] = s * from[rows, columns]^T: rows of `row` elements, the last of them zeros.
template <typename T>
void transpose(T* to, std::int64_t row, const T* from, std::int64_t rows, std::int64_t columns, T s) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) to[j * row + i] = s * from[i * columns + j];
}

// A, B and their transposes as the products read them; those that are not there, or that no wanted result reads, are empty.
template <typename T>
struct Copies {
  std::vector<T> At, sB, sBt;
};

template <typename T>
Term<T> as(const LowRank& l, Copies<T>& copies, bool forward) {
  const auto t = [](Address address) { return at<const T>(address); };
  const std::int64_t padded = (l.R + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
  const T s = static_cast<T>(l.s);
  if (forward) {
    copies.At.resize(l.K * padded);
    copies.sBt.resize(l.R * l.N);
    transpose(copies.At.data(), padded, t(l.A), l.R, l.K, T{1});
    transpose(copies.sBt.data(), l.N, t(l.B), l.N, l.R, s);
  } else if (l.B) {
    copies.sB.resize(l.N * padded);
    for (std::int64_t n = 0; n < l.N; ++n)
      for (std::int64_t r = 0; r < l.R; ++r) copies.sB[n * padded + r] = s * t(l.B)[n * l.R + r];
  }
  const Mask mask = mask_of(l.threshold, l.seed, l.offset);
  return {t(l.x), l.M, l.K, l.N, l.R, padded, static_cast<T>(l.scale), mask, t(l.A), copies.At.data(), copies.sB.data(), copies.sBt.data()};
}

template <typename T, typename Rows>
void run_forward(const LowRank& l, T* y, T* h, int threads, const Rows& forward_rows) {
  Copies<T> copies;
  const Term<T> term = as<T>(l, copies, true);
#pragma omp parallel for num_threads(threads) if (l.M * l.R * (l.K + l.N) > FEW)
  for (std::int64_t first = 0; first < l.M; first += BLOCK) forward_rows(term, y, h, first, std::min(BLOCK, l.M - first));
}

// out[size] = the sum of `parts` rows.
template <typename T>
void sum_of(T* out, const T* rows, std::int64_t parts, std::int64_t step, std::int64_t size) {
  std::copy_n(rows, size, out);
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::int64_t i = 0; i < size; ++i) out[i] += rows[part * step + i];
}

template <typename T, typename Rows>
void run_backward(const LowRank& l, Gradients<T> to, T* dB, int threads, const Rows& backward_rows) {
  Copies<T> copies;
  const Term<T> term = as<T>(l, copies, false);
  // What is summed over rows, chunk by chunk: dA, dBt and dc, as far as they are wanted.
  const std::int64_t dA = to.dA ? l.R * l.K : 0, dBt = dB ? l.R * l.N : 0, dc = to.dc ? l.N : 0, step = dA + dBt + dc;
  const std::int64_t chunks = std::max<std::int64_t>(1, (l.M + CHUNK - 1) / CHUNK);
  std::vector<T> sums(chunks * step, T{0});
#pragma omp parallel for num_threads(threads) if (l.M * l.R * (l.K + l.N) > FEW)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    Gradients<T> part = to;
    T* own = sums.data() + chunk * step;
    part.dA = dA ? own : nullptr, part.dBt = dBt ? own + dA : nullptr, part.dc = dc ? own + dA + dBt : nullptr;
    const std::int64_t last = std::min(l.M, (chunk + 1) * CHUNK);
    for (std::int64_t first = chunk * CHUNK; first < last; first += BLOCK)
      backward_rows(term, part, first, std::min(BLOCK, last - first));
  }
  if (dA) sum_of(to.dA, sums.data(), chunks, step, dA);
  if (dc) sum_of(to.dc, sums.data() + dA + dBt, chunks, step, dc);
  if (!dB) return;
  sum_of(sums.data() + dA, sums.data() + dA, chunks, step, dBt);
  transpose(dB, l.R, sums.data() + dA, l.R, l.N, static_cast<T>(l.s));
}

}  // namespace

void low_rank_forward(const LowRank& l, Address y, Address h, int threads) {
  if (l.itemsize == sizeof(float)) return run_forward(l, at<float>(y), at<float>(h), threads, forward_of_floats);
  if (l.itemsize == sizeof(double)) return run_forward(l, at<double>(y), at<double>(h), threads, forward_of_doubles);
  throw std::invalid_argument("low_rank_forward: got elements of " + std::to_string(l.itemsize) + " bytes, expected 4 or 8");
}

void low_rank_backward(const LowRank& l, Address W, Address dy, Address h, Address dx, Address dA, Address dB, Address dc,
                       int threads) {
  const auto run = [&](auto* rows, auto one) {
    using T = decltype(one);
    const Gradients<T> to{at<T>(W), at<T>(dy), at<T>(h), at<T>(dx), at<T>(dA), nullptr, at<T>(dc)};
    run_backward(l, to, at<T>(dB), threads, rows);
  };
  if (l.itemsize == sizeof(float)) return run(&backward_of_floats, 1.0f);
  if (l.itemsize == sizeof(double)) return run(&backward_of_doubles, 1.0);
  throw std::invalid_argument("low_rank_backward: got elements of " + std::to_string(l.itemsize) + " bytes, expected 4 or 8");
}

}  // namespace lora_kernels::cpu
