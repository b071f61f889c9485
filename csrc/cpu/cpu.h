// What lora_kernels._cpu offers: loops over addresses in a CPU's memory, on `threads` threads, without torch.
#pragma once
#include <cstdint>
#include <string>

namespace lora_kernels::cpu {

constexpr int INTERFACE = 1;  // of lora_kernels/cpu_extension.py: one more when a signature or a meaning here changes

using Address = std::uintptr_t;

// out[M, K] = keep(seed, first + i, k) of lora_kernels/dropout.py as ones and zeros of `dtype`.
void keep_rows(Address out, const std::string& dtype, std::int64_t first, std::int64_t M, std::int64_t K, std::int32_t threshold,
               std::int64_t seed, std::uint64_t offset, int threads);

// W of lora_kernels/nf4.py, flattened, in blocks of `blocksize`.
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

}  // namespace lora_kernels::cpu
