// The names of lora_kernels._cpu; what they do is in cpu.h.
//
// Compiled for OpenMP but not linked with it: at import the functions are found in the library that PyTorch has loaded, so
// that both share one pool of threads.
#include "cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

namespace pybind11::detail {

// Rows as Python has them: (address, stride, dtype), or None. Objects of a class would take a microsecond each.
template <>
struct type_caster<lora_kernels::cpu::Rows> {
  PYBIND11_TYPE_CASTER(lora_kernels::cpu::Rows, const_name("Rows"));
  bool load(handle from, bool) {
    value = {};
    if (from.is_none()) return true;
    if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != 3) return false;
    const auto piece = [&](int i) { return PyTuple_GET_ITEM(from.ptr(), i); };
    const auto address = PyLong_AsUnsignedLongLong(piece(0));
    const auto stride = PyLong_AsLongLong(piece(1));
    const char* dtype = PyUnicode_AsUTF8(piece(2));
    if (PyErr_Occurred()) return PyErr_Clear(), false;
    value = {address, stride, dtype};
    return true;
  }
};

}  // namespace pybind11::detail

namespace lora_kernels::cpu {

// (start, stop, R, A, B, s, scale, threshold, c, dA, dB, dc)
using Part = std::tuple<std::int64_t, std::int64_t, std::int64_t, Rows, Rows, double, double, std::int32_t, Rows, Rows, Rows, Rows>;

// What the segments of a call share is given once.
struct Shared {
  std::int64_t K, N, seed;
  std::uint64_t offset;
  const std::int64_t* order;

  std::vector<Segment> segments(const std::vector<Part>& parts) const {
    std::vector<Segment> found;
    for (const auto& [start, stop, R, A, B, s, scale, threshold, c, dA, dB, dc] : parts)
      found.push_back({start, stop, {{}, A, B, 0, K, N, R, s, scale, threshold, seed, offset, 0}, c, dA, dB, dc});
    return found;
  }
  Rows in_order(Rows rows) const {
    rows.order = order;
    return rows;
  }
};

}  // namespace lora_kernels::cpu

PYBIND11_MODULE(_cpu, m) {
  namespace py = pybind11;
  using namespace lora_kernels::cpu;
  using py::arg;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Loops over addresses in a CPU's memory, for lora_kernels/mask.py, backends/cpu and backends/torch.";
  m.attr("interface") = INTERFACE;

  py::class_<Weight>(m, "Weight", py::module_local(), "A weight in 4 bits; `values` of the 16 codes.")
      .def(py::init<Address, Address, Address, Address, Address, Address, std::int64_t>(), arg("codes"), arg("absmax"),
           arg("nested_absmax"), arg("nested_map"), arg("nested_offset"), arg("values"), arg("blocksize"));

  m.def("keep_rows", &keep_rows, Unlocked(), "out[M, K] = keep(seed, first + i, k) as ones and zeros.", arg("out"),
        arg("dtype"), arg("first"), arg("M"), arg("K"), arg("threshold"), arg("seed"), arg("offset"), arg("threads"));
  m.def("drop_rows", &drop_rows, Unlocked(), "out[M, K] = in * keep(seed, i, k) * scale.", arg("out"), arg("in"),
        arg("in_stride"), arg("itemsize"), arg("M"), arg("K"), arg("threshold"), arg("scale"), arg("seed"), arg("offset"),
        arg("threads"));
  m.def(
      "low_rank_forward",
      [](const Rows& x, const Rows& A, const Rows& B, std::int64_t M, std::int64_t K, std::int64_t N, std::int64_t R, double s,
         double scale, std::int32_t threshold, std::int64_t seed, std::uint64_t offset, std::int64_t first, const Rows& c,
         const Rows& y, bool add, const Rows& h, int threads) {
        low_rank_forward({x, A, B, M, K, N, R, s, scale, threshold, seed, offset, first}, c, y, add, h, threads);
      },
      Unlocked(), "h, and y = s * h * B^T + c, or y += s * h * B^T.", arg("x"), arg("A"), arg("B"), arg("M"), arg("K"), arg("N"),
      arg("R"), arg("s"), arg("scale"), arg("threshold"), arg("seed"), arg("offset"), arg("first"), arg("c"), arg("y"),
      arg("add"), arg("h"), arg("threads"));
  m.def(
      "low_rank_backward",
      [](const Rows& x, const Rows& A, const Rows& B, std::int64_t M, std::int64_t K, std::int64_t N, std::int64_t R, double s,
         double scale, std::int32_t threshold, std::int64_t seed, std::uint64_t offset, std::int64_t first, const Rows& W,
         const Rows& dy, const Rows& h, const Rows& dx, const Rows& dA, const Rows& dB, const Rows& dc, bool add, int threads) {
        low_rank_backward({x, A, B, M, K, N, R, s, scale, threshold, seed, offset, first}, {W, dy, h, dx, dA, dB, dc, add},
                          threads);
      },
      Unlocked(), "dx (+)= undrop(g * A) + dy * W, dA, dB, dc, each unless it is None.", arg("x"), arg("A"), arg("B"), arg("M"),
      arg("K"), arg("N"), arg("R"), arg("s"), arg("scale"), arg("threshold"), arg("seed"), arg("offset"), arg("first"), arg("W"),
      arg("dy"), arg("h"), arg("dx"), arg("dA"), arg("dB"), arg("dc"), arg("add"), arg("threads"));
  m.def(
      "grouped_forward",
      [](const std::vector<Part>& parts, std::int64_t K, std::int64_t N, std::int64_t seed, std::uint64_t offset, Address order,
         const Rows& x, const Rows& y, bool add, const Rows& h, int threads) {
        const Shared shared{K, N, seed, offset, reinterpret_cast<const std::int64_t*>(order)};
        grouped_forward(shared.segments(parts), shared.in_order(x), shared.in_order(y), add, h, threads);
      },
      Unlocked(), "low_rank_forward of each segment's rows, which are start : stop of `order`, or where that is 0 of x and y.",
      arg("segments"), arg("K"), arg("N"), arg("seed"), arg("offset"), arg("order"), arg("x"), arg("y"), arg("add"), arg("h"),
      arg("threads"));
  m.def(
      "grouped_backward",
      [](const std::vector<Part>& parts, std::int64_t K, std::int64_t N, std::int64_t seed, std::uint64_t offset, Address order,
         const Rows& x, const Rows& dy, const Rows& h, const Rows& dx, bool add, int threads) {
        const Shared shared{K, N, seed, offset, reinterpret_cast<const std::int64_t*>(order)};
        const auto in_order = [&](const Rows& rows) { return shared.in_order(rows); };
        grouped_backward(shared.segments(parts), in_order(x), in_order(dy), h, in_order(dx), add, threads);
      },
      Unlocked(), "low_rank_backward of each segment's rows.", arg("segments"), arg("K"), arg("N"), arg("seed"), arg("offset"),
      arg("order"), arg("x"), arg("dy"), arg("h"), arg("dx"), arg("add"), arg("threads"));
  m.def(
      "glu_forward",
      [](const std::string& activation, std::int64_t rows, std::int64_t columns, const Rows& a, const Rows& e, const Rows& u,
         int threads) { glu_forward({rows, columns, a, e, u, Rows(), Rows()}, activation, threads); },
      Unlocked(), "a = act(e) * u, or act(u).", arg("activation"), arg("rows"), arg("columns"), arg("a"), arg("e"), arg("u"),
      arg("threads"));
  m.def(
      "glu_backward",
      [](const std::string& activation, std::int64_t rows, std::int64_t columns, const Rows& da, const Rows& e, const Rows& u,
         const Rows& de, const Rows& du, int threads) { glu_backward({rows, columns, da, e, u, de, du}, activation, threads); },
      Unlocked(), "de = da * u * act'(e), du = da * act(e); without e: du = da * act'(u).", arg("activation"), arg("rows"),
      arg("columns"), arg("da"), arg("e"), arg("u"), arg("de"), arg("du"), arg("threads"));
  m.def("nf4_decode", &nf4_decode, Unlocked(), "out[i, j] = element start + i * step + j of the weight.", arg("weight"),
        arg("out"), arg("dtype"), arg("out_stride"), arg("rows"), arg("columns"), arg("start"), arg("step"), arg("threads"));
  m.def("nf4_product", &nf4_product, Unlocked(), "y[M, N] += x[M, K] * W^T.", arg("weight"), arg("x"), arg("x_stride"), arg("M"),
        arg("N"), arg("K"), arg("dtype"), arg("y"), arg("y_stride"), arg("threads"));
}
