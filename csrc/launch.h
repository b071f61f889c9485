// Raising errors and launching kernels, on the host.
#pragma once
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "nf4.h"

namespace lora_kernels {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Got>
void require(bool fits, const char* function, const char* name, const Got& got, const char* expected) {
  if (fits) return;
  std::ostringstream message;
  message << function << ": " << name << ": got " << got << ", expected " << expected;
  throw std::invalid_argument(message.str());
}

inline void check(cudaError_t error, const char* function) {
  if (error == cudaSuccess) return;
  std::string message = std::string(function) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver)
    message += "; it needs an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000);
  throw std::runtime_error(message);
}

template <class... Parameters, class... Arguments>
void launch(const char* function, void (*kernel)(Parameters...), std::int64_t blocks, int threads, Address stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = pointer<CUstream_st>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), function);
}

inline int processors(const char* function) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), function);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), function);
  return count;
}

inline int log2_of(int power_of_two) {
  int exponent = 0;
  while ((1 << exponent) < power_of_two) exponent++;
  return exponent;
}

}  // namespace lora_kernels
