// The row arithmetic by pointers, for tests, benchmarks and ops: addresses and counts in, nothing is checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "bindings/address.hpp"
#include "host/copy.hpp"
#include "kernels/cpu/quantize.hpp"
#include "kernels/cpu/rows.hpp"
#include "protocol/memory.hpp"

namespace py = pybind11;

namespace fa2a {

DType dtype_named(const std::string& name) {
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "float32") return DType::float32;
  throw py::value_error("dtype: \"" + name + "\" is not known; pass \"bfloat16\", \"float16\" or \"float32\"");
}

namespace {

ScaleFormat scale_format_named(const std::string& name) {
  if (name == "float32") return ScaleFormat::float32;
  if (name == "ue8m0") return ScaleFormat::ue8m0;
  throw py::value_error("scale: \"" + name + "\" is not known; pass \"float32\" or \"ue8m0\"");
}

void weighted_sum_at(const std::string& dtype, Address out, const std::vector<Address>& rows,
                     const std::vector<float>& weights, i32 hidden, float factor, bool zero) {
  if (rows.size() != weights.size()) throw py::value_error("weights: one a row; pass as many weights as rows");
  std::vector<const u8*> at;
  for (Address row : rows) at.push_back(pointer<const u8>(row));
  weighted_sum(dtype_named(dtype), pointer<u8>(out), at.data(), weights.data(), static_cast<i32>(rows.size()), hidden,
               factor, zero);
}

void quantize_rows(const std::string& dtype, const std::string& scale, Address q, Address scales, Address x,
                   i64 num_rows, i32 hidden) {
  const DType type = dtype_named(dtype);
  const ScaleFormat format = scale_format_named(scale);
  const auto width = static_cast<u64>(hidden);
  py::gil_scoped_release release;
  for (u64 row = 0; row < static_cast<u64>(num_rows); ++row)
    quantize_row(type, format, pointer<u8>(q) + row * width, pointer<u8>(scales) + row * scale_bytes(format, hidden),
                 pointer<const u8>(x) + row * width * item_bytes(type), hidden);
}

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
// On one core, or after a sleep, a row is finished whoever forgot to finish it: so the two threads spin, each on a core
// of its own.
void stay_on_core(i32 which) {
  cpu_set_t allowed, one;
  CPU_ZERO(&one);
  sched_getaffinity(0, sizeof allowed, &allowed);
  for (i32 core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &allowed) && which-- == 0) CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);  // with fewer cores than `which`, nothing changes
}

void await(const u64& word, u64 value) {
  for (u32 num_looks = 1; load_acquire(&word) != value; ++num_looks)
    if (num_looks % 65536 == 0) std::this_thread::yield();
}

// One thread streams a row and signals, another looks at it as soon as it sees the signal; returns how many rows were
// not whole. The row and the signals lie on lines of their own.
i64 torn_streamed_rows(i32 num_rounds, u64 num_bytes) {
  struct alignas(128) Word {
    u64 value = 0;
  };
  Word announced, taken;
  std::vector<u8> memory(num_bytes + 64), source(num_bytes);
  u8* row = memory.data() + (64 - reinterpret_cast<Address>(memory.data()) % 64);
  const auto num_all = static_cast<u64>(num_rounds);
  const auto pattern = [](u64 round) { return static_cast<u8>(round * 31 | 1); };
  i64 num_torn = 0;
  std::thread reader([&] {
    stay_on_core(0);
    for (u64 round = 1; round <= num_all; ++round) {
      await(announced.value, round);
      // From the end: what was stored last is what is on its way for longest.
      u64 left = num_bytes;
      while (left > 0 && row[left - 1] == pattern(round)) --left;
      num_torn += left > 0 ? 1 : 0;
      store_release(&taken.value, round);
    }
  });
  std::thread writer([&] {
    stay_on_core(1);
    for (u64 round = 1; round <= num_all; ++round) {
      memset(source.data(), pattern(round), num_bytes);
      stream_row(row, source.data(), num_bytes);
      finish_copies();
      store_release(&announced.value, round);
      await(taken.value, round);
    }
  });
  reader.join();
  writer.join();
  return num_torn;
}
#endif

}  // namespace

void bind_rows(py::module_& m) {
  m.def("weighted_sum", &weighted_sum_at, py::arg("dtype"), py::arg("out"), py::arg("rows"), py::arg("weights"),
        py::arg("hidden"), py::arg("factor") = 1.0f, py::arg("zero") = false);
  m.def(
      "widen_row",
      [](const std::string& dtype, Address out, Address row, i32 hidden) {
        widen_row(dtype_named(dtype), pointer<float>(out), pointer<const u8>(row), hidden);
      },
      py::arg("dtype"), py::arg("out"), py::arg("row"), py::arg("hidden"));
  m.def(
      "store_row",
      [](const std::string& dtype, Address row, Address sum, i32 hidden) {
        store_row(dtype_named(dtype), pointer<u8>(row), pointer<const float>(sum), hidden);
      },
      py::arg("dtype"), py::arg("row"), py::arg("sum"), py::arg("hidden"));
  m.def("quantize_rows", &quantize_rows, py::arg("dtype"), py::arg("scale"), py::arg("q"), py::arg("scales"),
        py::arg("x"), py::arg("num_rows"), py::arg("hidden"));
  m.def("scale_bytes",
        [](const std::string& scale, i32 hidden) { return scale_bytes(scale_format_named(scale), hidden); });
  m.def(
      "cast_to_e4m3",
      [](Address q, Address x, i32 count) {
        py::gil_scoped_release release;
        cast_row_to_e4m3(pointer<u8>(q), pointer<const float>(x), count);
      },
      py::arg("q"), py::arg("x"), py::arg("count"));
  m.def("copy_row",
        [](Address to, Address from, u64 num_bytes) { copy_row(pointer<u8>(to), pointer<const u8>(from), num_bytes); });
  // One call is one announcement: it finishes what it streamed.
  m.def("stream_row", [](Address to, Address from, u64 num_bytes) {
    stream_row(pointer<u8>(to), pointer<const u8>(from), num_bytes);
    finish_copies();
  });
#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
  m.def("torn_streamed_rows", &torn_streamed_rows, py::call_guard<py::gil_scoped_release>(), py::arg("num_rounds"),
        py::arg("num_bytes"));
#endif
}

}  // namespace fa2a
