// What lora_kernels._cpu offers: loops over addresses in a CPU's memory, on `threads` threads, without torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace lora_kernels::cpu {

constexpr int INTERFACE = 6;  // of lora_kernels/cpu_extension.py: one more when a signature or a meaning here changes

using Address = std::uintptr_t;

// out[M, K] = keep(seed, first + i, k) of lora_kernels/mask.py as ones and zeros of `dtype`.
void keep_rows(Address out, const std::string& dtype, std::int64_t first, std::int64_t M, std::int64_t K, std::int32_t threshold,
               std::int64_t seed, std::uint64_t offset, int threads);

// out[M, K] = in[M, K] * keep(seed, i, k) * scale for elements of `itemsize` 4 (float) or 8 (double); out's rows are adjacent, in's
// `in_stride` elements apart; both may be the same memory.
void drop_rows(Address out, Address in, std::int64_t in_stride, int itemsize, std::int64_t M, std::int64_t K,
               std::int32_t threshold, double scale, std::int64_t seed, std::uint64_t offset, int threads);

// A matrix of float32, bfloat16, float16 or float64: its rows are `stride` elements apart, their elements adjacent. Address 0: none.
// With `order` its row i is row order[i] of those.
struct Rows {
  enum Type { FLOAT, BFLOAT16, HALF, DOUBLE };
  Address address = 0;
  std::int64_t stride = 0;
  Type type = FLOAT;
  const std::int64_t* order = nullptr;
  Rows() = default;
  Rows(Address address, std::int64_t stride, Type type) : address(address), stride(stride), type(type) {}
  Rows(Address address, std::int64_t stride, const std::string& dtype);
  Address at(std::int64_t row, std::int64_t column) const {
    return address + ((order ? order[row] : row) * stride + column) * (type == DOUBLE ? 8 : type == FLOAT ? 4 : 2);
  }
  // The matrix of its rows from `row` on.
  Rows from(std::int64_t row) const {
    Rows rest = *this;
    if (order)
      rest.order += row;
    else if (address)
      rest.address = at(row, 0);
    return rest;
  }
};

// The low-rank part of a linear layer, and the mask of its dropout, with threshold 0 none. It is computed in double if x, A or B is
// of that type, else in float.
struct LowRank {
  Rows x, A, B;  // [M, K], [R, K], [N, R]
  std::int64_t M, K, N, R;
  double s, scale;  // scale: of the values that dropout keeps
  std::int32_t threshold;
  std::int64_t seed;
  std::uint64_t offset;
  std::int64_t first;  // the mask's row of x's first one; of x with an order it is the row's place in memory
};

// h[M, R] = drop(x) * A^T, y[M, N] = s * h * B^T + c[1, N], or where `add` y += s * h * B^T. The same bits for any number of threads.
void low_rank_forward(const LowRank& term, const Rows& c, const Rows& y, bool add, const Rows& h, int threads);

// What low_rank_backward reads and writes; each result unless its own address is 0.
struct LowRankGradients {
  Rows W, dy, h;        // [N, K], [M, N], [M, R]; W and dy of the type that is computed in, where W is there
  Rows dx, dA, dB, dc;  // [M, K], [R, K], [N, R], [1, N]
  bool add;             // to dx
};

// dx (+)= undrop(g * A) + dy * W, without the latter where W is not there; dA, dB and dc. g = s * dy * B. The same bits for any number
// of threads.
void low_rank_backward(const LowRank& term, const LowRankGradients& to, int threads);

// Rows start : stop of x, dy, y, dx and h have a term of their own, and with it its gradients; what is shared is not read of it.
struct Segment {
  std::int64_t start, stop;
  LowRank term;
  Rows c, dA, dB, dc;
};

// The same for each segment, whose bits depend on no other.
void grouped_forward(const std::vector<Segment>& segments, const Rows& x, const Rows& y, bool add, const Rows& h, int threads);
void grouped_backward(const std::vector<Segment>& segments, const Rows& x, const Rows& dy, const Rows& h, const Rows& dx, bool add,
                      int threads);

// The matrices of act(e) * u, each [rows, columns]; without e: act(u). a is da in the backward pass, which writes de and du.
struct Glu {
  std::int64_t rows, columns;
  Rows a, e, u, de, du;
};

// a = act(e) * u.
void glu_forward(const Glu& t, const std::string& activation, int threads);

// de = a * u * act'(e), du = a * act(e), each written where its tile of a has been read: in a's own memory, too.
void glu_backward(const Glu& t, const std::string& activation, int threads);

// W of lora_kernels/nf4/weight.py, flattened, in blocks of `blocksize`.
struct Weight {
  Address codes;                                     // uint8, two codes each, the first in the high half
  Address absmax;                                    // float per block; uint8 where nested
  Address nested_absmax, nested_map, nested_offset;  // float per 256 blocks, [256], [1]; 0: not nested
  Address values;                                    // float[16], of the codes
  std::int64_t blocksize;
};

// out[i, j] = element start + i * step + j of W, rounded once to `dtype`; rows of out are `out_stride` elements apart.
void nf4_decode(const Weight& weight, Address out, const std::string& dtype, std::int64_t out_stride, std::int64_t rows,
                std::int64_t columns, std::int64_t start, std::int64_t step, int threads);

// y[M, N] += x[M, K] * W^T, x, y and the values of W in `dtype`; K is a multiple of W's blocksize, and that of 64.
void nf4_product(const Weight& weight, Address x, std::int64_t x_stride, std::int64_t M, std::int64_t N, std::int64_t K,
                 const std::string& dtype, Address y, std::int64_t y_stride, int threads);

}  // namespace lora_kernels::cpu
