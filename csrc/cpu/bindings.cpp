// The names of lora_kernels._cpu; what they do is in cpu.h.
//
// Compiled for OpenMP but not linked with it: at import the functions are found in the library that PyTorch has loaded, so
// that both share one pool of threads.
#include "cpu.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cpu, m) {
  namespace py = pybind11;
  using namespace lora_kernels::cpu;
  using py::arg;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Loops over addresses in a CPU's memory, for lora_kernels/dropout.py and nf4_codec.py.";
  m.attr("interface") = INTERFACE;

  py::class_<Weight>(m, "Weight", py::module_local(), "A weight in 4 bits; `values` of the 16 codes.")
      .def(py::init<Address, Address, Address, Address, Address, Address, std::int64_t>(), arg("codes"), arg("absmax"),
           arg("nested_absmax"), arg("nested_map"), arg("nested_offset"), arg("values"), arg("blocksize"));

  m.def("keep_rows", &keep_rows, Unlocked(), "out[M, K] = keep(seed, first + i, k) as ones and zeros.", arg("out"),
        arg("dtype"), arg("first"), arg("M"), arg("K"), arg("threshold"), arg("seed"), arg("offset"), arg("threads"));
  m.def("drop_rows", &drop_rows, Unlocked(), "out[M, K] = in * keep(seed, i, k) * scale.", arg("out"), arg("in"),
        arg("in_stride"), arg("itemsize"), arg("M"), arg("K"), arg("threshold"), arg("scale"), arg("seed"), arg("offset"),
        arg("threads"));
  py::class_<SmallLayer>(m, "SmallLayer", py::module_local(), "A layer whose products take less time than PyTorch's way to them.")
      .def(py::init([](Address x, Address W, Address A, Address B, std::int64_t M, std::int64_t K, std::int64_t N, std::int64_t R,
                       double s, double scale, std::int32_t threshold, std::int64_t seed, std::uint64_t offset) {
             return SmallLayer{x, W, A, B, M, K, N, R, s, scale, threshold, seed, offset};
           }),
           arg("x"), arg("W"), arg("A"), arg("B"), arg("M"), arg("K"), arg("N"), arg("R"), arg("s"), arg("scale"),
           arg("threshold"), arg("seed"), arg("offset"));
  m.def("small_forward", &small_forward, "y and h of a small layer.", arg("layer"), arg("c"), arg("y"), arg("h"),
        arg("itemsize"));
  m.def("small_backward", &small_backward, "The gradients of a small layer, each unless its address is 0.", arg("layer"),
        arg("dy"), arg("h"), arg("dx"), arg("dA"), arg("dB"), arg("dc"), arg("itemsize"));
  m.def("nf4_decode", &nf4_decode, Unlocked(), "out[i, j] = element start + i * step + j of the weight.", arg("weight"),
        arg("out"), arg("dtype"), arg("out_stride"), arg("rows"), arg("columns"), arg("start"), arg("step"), arg("threads"));
}
