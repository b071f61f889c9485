// The names of lora_kernels._C; what they do is in nf4.h.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "nf4.h"

namespace py = pybind11;
using namespace lora_kernels;
using py::arg;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels on addresses in device memory: work is enqueued on `stream` of the current device.";
  m.attr("cuda_version") = CUDART_VERSION;

  py::enum_<Dtype>(m, "Dtype", py::module_local()).value("bf16", Dtype::bf16).value("fp16", Dtype::fp16).value("fp32", Dtype::fp32);

  py::class_<Weight>(m, "Weight", py::module_local(), "W[rows, columns] in 4 bits; `values` of the 16 codes.")
      .def(py::init<Address, Address, Address, Address, Address, std::int64_t, std::int64_t, int, std::array<float, 16>>(),
           arg("codes"), arg("absmax"), arg("nested_absmax"), arg("nested_map"), arg("nested_offset"), arg("rows"),
           arg("columns"), arg("blocksize"), arg("values"));

  m.def("nf4_dequantize", &nf4_dequantize, "out[rows, columns] = W.", arg("weight"), arg("out"), arg("row_stride"),
        arg("dtype"), arg("stream"));
  m.def("nf4_skinny_refuses", &nf4_skinny_refuses, "Why nf4_skinny cannot compute this; empty if it can.", arg("M"),
        arg("N"), arg("K"), arg("blocksize"));
  m.def(
      "nf4_skinny",
      [](const Weight& weight, Address x, std::int64_t x_stride, Address h, Address B, Address c, Address y, std::int64_t M,
         std::int64_t R, float scale, Address scale_address, Dtype dtype, Dtype adapter_dtype, Address stream) {
        nf4_skinny(weight, {x, x_stride, h, B, c, y, M, R, scale, scale_address, dtype, adapter_dtype}, stream);
      },
      "y[M, N] = x * W^T + scale * h * B^T + c for M <= 16.", arg("weight"), arg("x"), arg("x_stride"), arg("h"), arg("B"),
      arg("c"), arg("y"), arg("M"), arg("R"), arg("scale"), arg("scale_address"), arg("dtype"), arg("adapter_dtype"),
      arg("stream"));
  m.def("nf4_quantize", &nf4_quantize, "codes and absmax of `elements` values, and the first that is not finite.",
        arg("weight"), arg("elements"), arg("dtype"), arg("blocksize"), arg("values"), arg("codes"), arg("absmax"),
        arg("first_bad"), arg("stream"));
  m.def("nf4_quantize_absmax", &nf4_quantize_absmax, "absmax - offset in 8 bits, in blocks of 256.", arg("absmax"),
        arg("blocks"), arg("offset"), arg("map"), arg("quantized"), arg("nested_absmax"), arg("stream"));
}
