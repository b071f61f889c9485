// Enough of CUDA to run csrc/ on a CPU: the kernels' own source, compiled by a C++ compiler, thread by thread.
//
// The threads of a block are fibres that take turns; they meet at __syncthreads, and 32 of them at each warp operation. A
// block after the other runs. Arithmetic is IEEE float32 without contraction, as the kernels ask for with __fmul_rn and the
// like. Fragments of the matrix instruction are laid out as the PTX manual says (9.7.14, mma.m16n8k16).
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 13000

// ---- types ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { std::uint32_t x, y; };
struct alignas(16) uint4 { std::uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half { _Float16 value; };
struct __nv_bfloat16 { std::uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(v);
  if (v != v) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }

// ---- arithmetic and memory ----

using std::max;
using std::min;
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long v) {
  const unsigned long long before = *p;
  *p = std::min(before, v);
  return before;
}
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<std::uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

// ---- threads ----

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {
  int arrived = 0, generation = 0;
};
struct Lane {
  std::uint32_t words[6];
};
struct Warp {
  Barrier barrier;
  Lane lanes[32];
};

struct Block {
  std::vector<ucontext_t> fibres;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  std::function<void()> body;
  std::uint64_t events = 0;
  unsigned current = 0;

  void yield() { swapcontext(&fibres[current], &scheduler); }

  void meet(Barrier& barrier, int threads) {
    events++;
    const int generation = barrier.generation;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      barrier.generation++;
    }
    while (barrier.generation == generation) yield();
  }

  Warp& meet_warp() {
    Warp& warp = warps[current / 32];
    meet(warp.barrier, 32);
    return warp;
  }
};
inline Block block;

inline void enter() {
  block.body();
  block.done[block.current] = true;
  block.events++;
  block.yield();
}

inline void run(dim3 grid, dim3 threads, std::function<void()> body) {
  gridDim = grid, blockDim = threads;
  const unsigned count = threads.x;
  block.body = std::move(body);
  block.fibres.resize(count), block.stacks.resize(count, std::vector<char>(256 << 10));
  for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
    block.done.assign(count, false), block.warps.assign((count + 31) / 32, {}), block.barrier = {};
    for (unsigned i = 0; i < count; i++) {
      getcontext(&block.fibres[i]);
      block.fibres[i].uc_stack.ss_sp = block.stacks[i].data();
      block.fibres[i].uc_stack.ss_size = block.stacks[i].size();
      makecontext(&block.fibres[i], enter, 0);
    }
    for (unsigned left = count; left > 0;) {
      const std::uint64_t before = block.events;
      for (unsigned i = 0; i < count; i++) {
        if (block.done[i]) continue;
        block.current = threadIdx.x = i;
        swapcontext(&block.scheduler, &block.fibres[i]);
        left -= block.done[i];
      }
      if (block.events == before) throw std::runtime_error("emulator: threads wait for each other for ever");
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::block.meet(emulator::block.barrier, blockDim.x); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  using namespace emulator;
  block.warps[block.current / 32].lanes[block.current % 32].words[0] = std::bit_cast<std::uint32_t>(value);
  Warp& warp = block.meet_warp();
  const float other = std::bit_cast<float>(warp.lanes[block.current % 32 ^ distance].words[0]);
  block.meet_warp();
  return other;
}

// ---- the runtime: a device of two processors ----

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorNoDevice, cudaErrorInsufficientDriver };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulator::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// ---- in place of csrc/ptx.cuh ----

#define LORA_KERNELS_PTX
namespace lora_kernels {

using SharedAddress = std::uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }
inline float2 load_shared_pair(SharedAddress address) { return *reinterpret_cast<const float2*>(address); }

template <class T>
float half_of(std::uint32_t word, int i) {
  const std::uint16_t bits = static_cast<std::uint16_t>(word >> 16 * i);
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) return __half2float({std::bit_cast<_Float16>(bits)});
  else return __bfloat162float({bits});
}

template <class T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  using namespace emulator;
  const int lane = block.current % 32;
  block.warps[block.current / 32].lanes[lane] = {{a[0], a[1], a[2], a[3], b0, b1}};
  Warp& warp = block.meet_warp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const Lane& of_a = warp.lanes[row % 8 * 4 + k % 8 / 2];
      const Lane& of_b = warp.lanes[column * 4 + k % 8 / 2];
      d[i] += half_of<T>(of_a.words[row / 8 + k / 8 * 2], k % 2) * half_of<T>(of_b.words[4 + k / 8], k % 2);
    }
  }
  block.meet_warp();
}

}  // namespace lora_kernels
