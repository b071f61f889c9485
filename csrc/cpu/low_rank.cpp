// The low-rank part of equations 1 to 6 (lora_kernels/reference/linear.py): each direction is one pass over the rows of x, dy, y and
// dx, with one mask for all that needs it. PyTorch's way has a pass, and memory, for each product and mask. Sums are in float, or in
// double: in 16 bits one result in 600 broke the tolerance rule. What is narrower is widened a tile at a time and rounded once.
//
// vdpbf16ps, two products of bfloat16 at once, would not pay: of the six products only h and g have no factor in float, and half of
// their multiplications are a sixth of all, which for R = 8 and 2048 features are 1.2 % of a layer's.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum rounded once: half the instructions, and no bits are promised here
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "copies.h"
#include "cpu.h"
#include "mask.h"
#include "products.h"
#include "rows.h"

namespace lora_kernels::cpu {
namespace {

constexpr std::int64_t BLOCK = 32;     // rows that are computed together, so that what they read of A and B stays in cache
constexpr std::int64_t COLUMNS = 128;  // of a tile of such rows
constexpr std::int64_t PARTS = 32;     // terms that are summed up apart: of 128 one draw in 40 broke the rule at R = 1
constexpr std::int64_t CHUNK = 64;     // rows, at least, whose parts of dA, dB and dc are summed up first
constexpr std::int64_t CHUNKS = 32;    // at most: 4 MiB of such parts for 2048 features and R = 8
constexpr std::int64_t FEW = 1 << 16;  // multiplications that one thread computes before others have begun

template <typename T>
struct Term {
  std::int64_t M, K, N, R, padded;  // padded: R to whole vectors
  Rows x;
  T scale;  // of the values that dropout keeps
  Mask mask;
  std::int64_t first;       // the mask's row of x's first one
  std::unique_ptr<T[]> A, At;    // [R, K], [K, padded]
  std::unique_ptr<T[]> sBt, sB;  // s * B: [R, N], [N, padded]
};

// What a thread computes in: rows of a tile.
template <typename T>
struct Room {
  std::uint16_t lanes[BLOCK * COLUMNS];
  T tile[BLOCK * COLUMNS], wide[BLOCK * COLUMNS];
};

// A tile as the products read it, and add to it.
template <typename T>
struct Tile {
  T* at;
  std::int64_t row;
};

// in[p], in its own memory where that is of type T and `as_is`.
template <typename T>
INLINE Tile<T> read(T* room, const Rows& in, const Place& p, bool as_is = true) {
  if (as_is && in.type == OWN<T> && !in.order) return {reinterpret_cast<T*>(in.at(p.first, p.column)), in.stride};
  read_tile(room, COLUMNS, in, p);
  return {room, COLUMNS};
}

// tile *= keep / (1 - p̂), whose lanes are drawn.
template <typename T>
INLINE void drop(T* tile, const std::uint16_t* lanes, const Term<T>& term, const Place& p) {
  const std::int32_t threshold = term.mask.threshold;
  const T scale = term.scale;
  for (std::int64_t i = 0; i < p.rows; ++i)
    for (std::int64_t j = 0; j < p.columns; ++j)
      tile[i * COLUMNS + j] *= lanes[i * COLUMNS + j] >= threshold ? scale : T{0};
}

// drop(x)[p].
template <typename T>
INLINE Tile<T> dropped_x(Room<T>& room, const Term<T>& term, const Place& p) {
  const bool drops = term.mask.threshold;
  const auto v = read(room.tile, term.x, p, !drops);
  if (drops) drop(room.tile, room.lanes, term, p);
  return v;
}

template <typename T>
INLINE void draw(std::uint16_t* lanes, const Term<T>& term, const Place& p) {
  if (!term.mask.threshold) return;
  const auto column = static_cast<std::uint32_t>(p.column / LANES);
  const std::int64_t runs = term.x.order ? p.rows : 1, rows = p.rows / runs;  // of rows that are neighbours in the mask
  for (std::int64_t run = 0; run < runs; ++run, lanes += rows * COLUMNS) {
    const std::int64_t row = term.x.order ? term.x.order[p.first + run] : term.first + p.first;
    draw_lanes(lanes, static_cast<std::uint32_t>(row), rows, column, COLUMNS / LANES, term.mask);
  }
}

// Where out[p] is summed up: in its own memory, where `own`, else in `room` from 0 on.
template <typename T>
INLINE Tile<T> sum_of(T* room, const Rows& out, bool own, const Place& p) {
  if (own && out.type == OWN<T> && !out.order) return {reinterpret_cast<T*>(out.at(p.first, p.column)), out.stride};
  std::fill_n(room, p.rows * COLUMNS, T{0});
  return {room, COLUMNS};
}

// Equations 1 and 2 of the rows first : first + rows.
template <int BYTES, typename T>
INLINE void forward(const Term<T>& term, const Rows& c, const Rows& y, bool add, const Rows& h, std::int64_t first,
                    std::int64_t rows) {
  const std::int64_t K = term.K, N = term.N, padded = term.padded;
  Room<T> room;
  std::vector<T> sums(rows * padded);
  for (std::int64_t k = 0; k < K; k += COLUMNS) {
    const Place p{first, rows, k, std::min(COLUMNS, K - k)};
    draw(room.lanes, term, p);
    const auto v = dropped_x(room, term, p);
    for (std::int64_t j = 0; j < p.columns; j += PARTS)  // 1
      combine<BYTES>(sums.data(), padded, rows, padded, Factor<T>{v.at + j, v.row, 1}, term.At.get() + (k + j) * padded, padded,
                     std::min(PARTS, p.columns - j));
  }
  write_tile(sums.data(), padded, h, false, {first, rows, 0, term.R});
  for (std::int64_t n = 0; n < N; n += COLUMNS) {
    const Place p{first, rows, n, std::min(COLUMNS, N - n)};
    const auto sum = sum_of(room.wide, y, add, p);
    if (c.address) read_tile(sum.at, sum.row, {c.address, 0, c.type}, p);
    for (std::int64_t r = 0; r < term.R; r += PARTS)  // 2
      combine<BYTES>(sum.at, sum.row, rows, p.columns, Factor<T>{sums.data() + r, padded, 1}, term.sBt.get() + r * N + n, N,
                     std::min(PARTS, term.R - r));
    if (sum.at == room.wide) write_tile(room.wide, COLUMNS, y, add, p);
  }
}

// The sums over a chunk of rows; 0 for what is not wanted.
template <typename T>
struct Sums {
  T *dA, *dBt, *dc;
};

// Equation 4 of a tile.
template <int BYTES, typename T>
INLINE void write_dx(const Term<T>& term, const LowRankGradients& to, Room<T>& room, const T* g, const Place& p) {
  const auto sum = sum_of(room.wide, to.dx, to.add && term.mask.threshold == 0, p);
  for (std::int64_t r = 0; r < term.R; r += PARTS)
    combine<BYTES>(sum.at, sum.row, p.rows, p.columns, Factor<T>{g + r, term.padded, 1}, term.A.get() + r * term.K + p.column,
                   term.K, std::min(PARTS, term.R - r));
  if (term.mask.threshold) drop(room.wide, room.lanes, term, p);
  if (to.W.address) {
    const Factor<T> dy{reinterpret_cast<const T*>(to.dy.at(p.first, 0)), to.dy.stride, 1};
    const T* W = reinterpret_cast<const T*>(to.W.at(0, p.column));
    combine<BYTES>(room.wide, COLUMNS, p.rows, p.columns, dy, W, to.W.stride, term.N);
  }
  if (sum.at == room.wide) write_tile(room.wide, COLUMNS, to.dx, to.add, p);
}

// g of the rows first : first + rows by equation 3, and their part of equations 6.
template <int BYTES, typename T>
INLINE void read_dy(const Term<T>& term, const LowRankGradients& to, const Sums<T>& sums, T* g, std::int64_t first,
                    std::int64_t rows) {
  const std::int64_t N = term.N, R = term.R, padded = term.padded;
  T room[BLOCK * COLUMNS];
  std::vector<T> h(sums.dBt ? rows * R : 0);
  if (sums.dBt) read_tile(h.data(), R, to.h, {first, rows, 0, R});
  for (std::int64_t n = 0; n < N; n += COLUMNS) {
    const Place p{first, rows, n, std::min(COLUMNS, N - n)};
    const auto dy = read(room, to.dy, p);
    for (std::int64_t j = 0; g && j < p.columns; j += PARTS)
      combine<BYTES>(g, padded, rows, padded, Factor<T>{dy.at + j, dy.row, 1}, term.sB.get() + (n + j) * padded, padded,
                     std::min(PARTS, p.columns - j));
    if (sums.dBt) combine<BYTES>(sums.dBt + n, N, R, p.columns, Factor<T>{h.data(), 1, R}, dy.at, dy.row, rows);
    if (!sums.dc) continue;
    T sum[COLUMNS] = {};
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < p.columns; ++j) sum[j] += dy.at[i * dy.row + j];
    for (std::int64_t j = 0; j < p.columns; ++j) sums.dc[n + j] += sum[j];
  }
}

// Equations 3 to 6 of the rows first : first + rows.
template <int BYTES, typename T>
INLINE void backward(const Term<T>& term, const LowRankGradients& to, const Sums<T>& sums, std::int64_t first,
                     std::int64_t rows) {
  const std::int64_t K = term.K, R = term.R, padded = term.padded;
  std::vector<T> g(to.dx.address || sums.dA ? rows * padded : 0);
  read_dy<BYTES>(term, to, sums, g.empty() ? nullptr : g.data(), first, rows);
  if (g.empty()) return;
  Room<T> room;
  for (std::int64_t k = 0; k < K; k += COLUMNS) {
    const Place p{first, rows, k, std::min(COLUMNS, K - k)};
    draw(room.lanes, term, p);
    if (to.dx.address) write_dx<BYTES>(term, to, room, g.data(), p);
    if (!sums.dA) continue;
    const auto v = dropped_x(room, term, p);
    combine<BYTES>(sums.dA + k, K, R, p.columns, Factor<T>{g.data(), 1, padded}, v.at, v.row, rows);  // 5
  }
}

#define LOW_RANK(CPU, BYTES, T, forward_of, backward_of)                                                                   \
  CPU void forward_of(const Term<T>& term, const Rows& c, const Rows& y, bool add, const Rows& h, std::int64_t first,      \
                      std::int64_t rows) {                                                                                 \
    forward<BYTES>(term, c, y, add, h, first, rows);                                                                       \
  }                                                                                                                        \
  CPU void backward_of(const Term<T>& term, const LowRankGradients& to, const Sums<T>& sums, std::int64_t first,           \
                       std::int64_t rows) {                                                                                \
    backward<BYTES>(term, to, sums, first, rows);                                                                          \
  }
LOW_RANK(FOR_EACH_CPU, 32, float, forward_of_floats, backward_of_floats)
LOW_RANK(FOR_EACH_CPU, 32, double, forward_of_doubles, backward_of_doubles)
#ifdef FOR_AVX512
LOW_RANK(FOR_AVX512, 64, float, forward_of_floats_wide, backward_of_floats_wide)
const bool wide = __builtin_cpu_supports("x86-64-v4");
const auto forward_here = wide ? &forward_of_floats_wide : &forward_of_floats;
const auto backward_here = wide ? &backward_of_floats_wide : &backward_of_floats;
#else
const auto forward_here = &forward_of_floats;
const auto backward_here = &backward_of_floats;
#endif

// With A and B as the products read them; those that are not there, or that no wanted result reads, are empty.
template <typename T>
Term<T> as(const LowRank& l, bool forward, bool reads_A) {
  const std::int64_t padded = (l.R + WIDTH<T, LEAST> - 1) / WIDTH<T, LEAST> * WIDTH<T, LEAST>;
  const T s = static_cast<T>(l.s);
  Term<T> term{l.M, l.K, l.N, l.R, padded, l.x, static_cast<T>(l.scale), mask_of(l.threshold, l.seed, l.offset), l.first, {}, {}, {}, {}};
  if (forward) {
    term.At = transpose_of<T>(l.A, l.R, l.K, padded);
    term.sBt = transpose_of<T>(l.B, l.N, l.R, l.N, s);
  } else {
    if (reads_A) term.A = copy_of<T>(l.A, l.R, l.K, l.K);
    if (l.B.address) term.sB = copy_of<T>(l.B, l.N, l.R, padded, s);
  }
  return term;
}

template <typename T, typename OfRows>
void run_forward(const LowRank& l, const Rows& c, const Rows& y, bool add, const Rows& h, int threads, OfRows* forward_of) {
  const Term<T> term = as<T>(l, true, true);
#pragma omp parallel for num_threads(threads) if (l.M * l.R * (l.K + l.N) > FEW)
  for (std::int64_t first = 0; first < l.M; first += BLOCK) forward_of(term, c, y, add, h, first, std::min(BLOCK, l.M - first));
}

// The sum of `parts` rows, in the first of them.
template <typename T>
void sum_up(T* rows, std::int64_t parts, std::int64_t size) {
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::int64_t i = 0; i < size; ++i) rows[i] += rows[part * size + i];
}

template <typename T, typename OfRows>
void run_backward(const LowRank& l, const LowRankGradients& to, int threads, OfRows* backward_of) {
  const Term<T> term = as<T>(l, false, to.dx.address);
  // What is summed over rows, chunk by chunk, which depend on M alone: dA, dBt and dc, as far as they are wanted.
  const std::int64_t dA = to.dA.address ? l.R * l.K : 0, dBt = to.dB.address ? l.R * l.N : 0, dc = to.dc.address ? l.N : 0;
  const std::int64_t step = dA + dBt + dc, chunk = std::max(CHUNK, ((l.M + CHUNKS - 1) / CHUNKS + BLOCK - 1) / BLOCK * BLOCK);
  const std::int64_t chunks = std::max<std::int64_t>(1, (l.M + chunk - 1) / chunk);
  const std::unique_ptr<T[]> sums(new T[chunks * step]);
#pragma omp parallel for num_threads(threads) if (l.M * l.R * (l.K + l.N) > FEW)
  for (std::int64_t part = 0; part < chunks; ++part) {
    T* own = sums.get() + part * step;
    std::fill_n(own, step, T{0});
    const Sums<T> here{dA ? own : nullptr, dBt ? own + dA : nullptr, dc ? own + dA + dBt : nullptr};
    const std::int64_t last = std::min(l.M, (part + 1) * chunk);
    for (std::int64_t first = part * chunk; first < last; first += BLOCK)
      backward_of(term, to, here, first, std::min(BLOCK, last - first));
  }
  sum_up(sums.get(), chunks, step);
  const T* sum = sums.get();
  if (dA) write_tile(sum, l.K, to.dA, false, {0, l.R, 0, l.K});
  if (dc) write_tile(sum + dA + dBt, l.N, to.dc, false, {0, 1, 0, l.N});
  if (!dBt) return;
  const Rows dBt_sum{reinterpret_cast<Address>(sum + dA), l.N, OWN<T>};
  write_tile(transpose_of<T>(dBt_sum, l.R, l.N, l.R, static_cast<T>(l.s)).get(), l.R, to.dB, false, {0, l.N, 0, l.R});
}

bool is_double(const Rows& m) { return m.address && m.type == Rows::DOUBLE; }

}  // namespace

void low_rank_forward(const LowRank& l, const Rows& c, const Rows& y, bool add, const Rows& h, int threads) {
  if (is_double(l.x) || is_double(l.A) || is_double(l.B)) return run_forward<double>(l, c, y, add, h, threads, forward_of_doubles);
  run_forward<float>(l, c, y, add, h, threads, forward_here);
}

void low_rank_backward(const LowRank& l, const LowRankGradients& to, int threads) {
  if (is_double(to.dy) || is_double(l.A) || is_double(l.B) || is_double(to.h)) return run_backward<double>(l, to, threads, backward_of_doubles);
  run_backward<float>(l, to, threads, backward_here);
}

}  // namespace lora_kernels::cpu
