// y = x * W^T + s * h * B^T + c for at most 16 tokens: each 4-bit weight is read once, and decoded into tensor core fragments.
//
// 16 rows of W are the rows of a product with the tokens as its columns. Of 64 consecutive codes of a row, lane 4g+t holds
// the 16 from 16t on: one 8-byte load is its part of four fragments. That permutes k, in the same way for W and x.
// A weight is rounded to x's dtype exactly as dequantising does, so that decoding and training see the same weight.
#include "launch.h"
#include "nf4.cuh"

namespace lora_kernels {
namespace {

constexpr int WARPS = THREADS / 32;  // they share out K
constexpr int ROWS = 16;             // of W, in a block of threads
constexpr int CHUNK = 64;            // codes of a row that a warp takes at a time
constexpr int LANE_CODES = CHUNK / 4;  // a unit
constexpr int STEP = WARPS * 4;        // units from a warp's chunk to its next
constexpr int DEPTH = 4;  // chunks whose loads a warp has in flight: 16 KiB per block

template <class T>
struct Arguments {
  const std::uint8_t* codes;
  Absmax absmax;
  Values values;
  int log2_units;  // 16 codes each, in a block
  const T* x;
  std::int64_t x_stride;
  const void *h, *B;
  const T* c;
  T* y;
  const float* scale_address;
  float scale;
  int M, N, K, R;
  Dtype adapter;
};

// This lane's 16 codes of a chunk and their absmax, for row g and row g + 8. Blocks are counted by `units` of 16 codes.
template <bool NESTED>
struct Part {
  uint2 codes[2];
  Scale<NESTED> scale[2];

  __device__ __forceinline__ void read(const uint2* const (&p)[2], const std::uint32_t (&units)[2], int offset,
                                       const Absmax& absmax, int log2_units) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      codes[r] = __ldcs(p[r] + offset);
      scale[r].read(absmax, (units[r] + offset) >> log2_units);
    }
  }
};

// s * h[m] . B[n] + c[n]
template <class T>
__device__ __forceinline__ float low_rank(const Arguments<T>& a, int m, int n) {
  if (m >= a.M || n >= a.N) return 0.0f;
  float sum = 0.0f;
#pragma unroll 4
  for (int r = 0; r < a.R; r++)
    sum += load(a.h, a.adapter, m * a.R + r) * load(a.B, a.adapter, static_cast<std::int64_t>(n) * a.R + r);
  const float scale = a.scale_address ? a.scale * *a.scale_address : a.scale;
  return scale * sum + (a.c ? widen(a.c[n]) : 0.0f);
}

template <class T, int TOKENS, bool NESTED>
__global__ void __launch_bounds__(THREADS, 2) skinny_kernel(const __grid_constant__ Arguments<T> a) {
  __shared__ PairTable pairs;
  __shared__ float map[256];
  __shared__ float partial[WARPS][TOKENS][ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * ROWS, units_per_row = a.K / LANE_CODES, chunks = (units_per_row + 3) / 4;
  std::uint32_t units[2];  // of this lane in its next chunk, from the weight's start
  const uint2* p_codes[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    units[r] = static_cast<std::uint32_t>(min(row0 + g + 8 * r, a.N - 1)) * units_per_row + warp * 4 + t;
    p_codes[r] = reinterpret_cast<const uint2*>(a.codes) + units[r];
  }
  const uint4* p_x[TOKENS / 8];  // columns of absent tokens repeat the last one's, and are not stored
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++)
    p_x[n] = reinterpret_cast<const uint4*>(a.x + min(n * 8 + g, a.M - 1) * a.x_stride) + (warp * 4 + t) * 2;
  // A lane whose units lie beyond the row's end reads nothing, and its zeros meet zeros.
  int left = units_per_row - (warp * 4 + t);
  Part<NESTED> parts[DEPTH] = {};
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (d * STEP < left) parts[d].read(p_codes, units, d * STEP, a.absmax, a.log2_units);

  // While those are on their way: the tables, and the output's low-rank term and bias.
  fill(pairs, a.values);
  if constexpr (NESTED) map[threadIdx.x] = a.absmax.map[threadIdx.x];
  const float offset = NESTED ? *a.absmax.offset : 0.0f;
  const int out_row = threadIdx.x % ROWS, out_token = threadIdx.x / ROWS;
  const float low = low_rank(a, out_token, row0 + out_row);
  __syncthreads();

  const SharedAddress copies = copies_of_lane(pairs);
  float sum[TOKENS / 8][4] = {};
  for (int chunk0 = warp; chunk0 < chunks; chunk0 += WARPS * DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (chunk0 + d * WARPS >= chunks) break;
      uint4 x[TOKENS / 8][2] = {};
      if (d * STEP < left) {
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++) x[n][0] = __ldg(p_x[n] + d * STEP * 2), x[n][1] = __ldg(p_x[n] + d * STEP * 2 + 1);
      }
      const float scale[2] = {parts[d].scale[0].value(map, offset), parts[d].scale[1].value(map, offset)};
#pragma unroll
      for (int j = 0; j < 4; j++) {  // four codes of each row
        std::uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const std::uint32_t word = j < 2 ? parts[d].codes[i % 2].x : parts[d].codes[i % 2].y;
          const float2 pair = pair_of(copies, word, j % 2 * 2 + i / 2);
          w[i] = pack<T>(__fmul_rn(pair.x, scale[i % 2]), __fmul_rn(pair.y, scale[i % 2]));
        }
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
          mma<T>(sum[n], w, j % 2 ? x[n][j / 2].z : x[n][j / 2].x, j % 2 ? x[n][j / 2].w : x[n][j / 2].y);
      }
      if ((d + DEPTH) * STEP < left) parts[d].read(p_codes, units, (d + DEPTH) * STEP, a.absmax, a.log2_units);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) p_codes[r] += DEPTH * STEP, units[r] += DEPTH * STEP;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) p_x[n] += DEPTH * STEP * 2;
    left -= DEPTH * STEP;
  }

#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) partial[warp][n * 8 + 2 * t + i % 2][g + i / 2 * 8] = sum[n][i];
  __syncthreads();
  if (out_token < a.M && row0 + out_row < a.N) {
    float total = low;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += partial[w][out_token][out_row];  // always in this order
    a.y[static_cast<std::int64_t>(out_token) * a.N + row0 + out_row] = round_to<T>(total);
  }
}

template <class T>
void skinny(const Weight& w, const Skinny& s, Address stream) {
  Values values;
  for (int i = 0; i < 16; i++) values.of_code[i] = w.values[i];
  const Arguments<T> arguments{pointer<const std::uint8_t>(w.codes), Absmax(w), values, log2_of(w.blocksize / LANE_CODES),
                               pointer<const T>(s.x), s.x_stride, pointer<const void>(s.h), pointer<const void>(s.B),
                               pointer<const T>(s.c), pointer<T>(s.y), pointer<const float>(s.scale_address), s.scale,
                               static_cast<int>(s.M), static_cast<int>(w.rows), static_cast<int>(w.columns),
                               static_cast<int>(s.R), s.adapter_dtype};
  auto kernel = s.M <= 8 ? (w.nested_absmax ? skinny_kernel<T, 8, true> : skinny_kernel<T, 8, false>)
                         : (w.nested_absmax ? skinny_kernel<T, 16, true> : skinny_kernel<T, 16, false>);
  launch("nf4_skinny", kernel, (w.rows + ROWS - 1) / ROWS, THREADS, stream, arguments);
}

}  // namespace

const char* nf4_skinny_refuses(std::int64_t M, std::int64_t N, std::int64_t K, int blocksize) {
  if (M < 1 || M > 16) return "it takes 1 to 16 tokens";
  if (K % LANE_CODES != 0) return "a row must hold a multiple of 16 codes";
  if (blocksize < LANE_CODES) return "a block must hold at least 16 codes";
  if (K >= 1 << 30 || N >= 1 << 30 || N * (K / LANE_CODES) >= 1ll << 32) return "it counts units of 16 codes in 32 bits";
  return "";
}

void nf4_skinny(const Weight& w, const Skinny& s, Address stream) {
  constexpr const char* NAME = "nf4_skinny";
  w.check(NAME);
  const std::string refusal = nf4_skinny_refuses(s.M, w.rows, w.columns, w.blocksize);
  if (!refusal.empty()) throw std::invalid_argument(std::string(NAME) + ": " + refusal);
  require(s.dtype != Dtype::fp32, NAME, "dtype", "fp32", "bf16 or fp16");
  require(s.x && s.y, NAME, "x or y", "null", "an address");
  require(s.R >= 0 && s.R < 1 << 20, NAME, "R", s.R, "0 to 2^20");
  require(s.R == 0 || (s.h && s.B), NAME, "h or B", "null", "an address where R > 0");
  require(w.codes % 8 == 0, NAME, "codes", w.codes, "an address that is a multiple of 8");
  require(s.x % 16 == 0, NAME, "x", s.x, "an address that is a multiple of 16");
  require(s.x_stride % 8 == 0 && s.x_stride >= 0, NAME, "x_stride", s.x_stride, "a multiple of 8");
  s.dtype == Dtype::bf16 ? skinny<__nv_bfloat16>(w, s, stream) : skinny<__half>(w, s, stream);
}

}  // namespace lora_kernels
