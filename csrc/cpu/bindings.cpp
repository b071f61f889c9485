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
  m.def("nf4_decode", &nf4_decode, Unlocked(), "out[i, j] = element start + i * step + j of the weight.", arg("weight"),
        arg("out"), arg("dtype"), arg("out_stride"), arg("rows"), arg("columns"), arg("start"), arg("step"), arg("threads"));
}
