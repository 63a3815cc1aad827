// grinqh._core: the core for NumPy arrays (and anything else that speaks DLPack), without torch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "core/validate.h"
#include "grinqh/core.h"
#include "threads.h"

namespace grinqh::python {
namespace {

using namespace nb::literals;

using Inputs = std::vector<Input>;

constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::neon};

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

// Runs an entry of the core on our threads, without Python's lock.
template <typename Params>
void call(Status (*entry)(const Params&, const Executor&), const Params& params) {
  Status status;
  {
    const nb::gil_scoped_release release;
    status = entry(params, thread_executor());
  }
  if (!status.ok()) throw nb::value_error(status.message);
}

PlaneWidths checked_widths(const std::vector<int>& widths, std::size_t planes) {
  PlaneWidths result;
  if (widths.empty() || widths.size() > kMaxPlanes) {
    refuse("widths has " + std::to_string(widths.size()) + " entries: allowed are 1 to " + std::to_string(kMaxPlanes));
  }
  if (widths.size() != planes) {
    refuse("widths has " + std::to_string(widths.size()) + " entries: allowed is one for each of the " +
           std::to_string(planes) + " planes");
  }
  for (const int width : widths) {
    if (!is_plane_width(width)) refuse("widths has " + std::to_string(width) + ": allowed are 1, 2, 4 and 8");
    result.width[result.count++] = width;
  }
  if (!result.valid()) {
    refuse("widths add up to " + std::to_string(result.bits(result.count)) + ": allowed are at most " +
           std::to_string(kCodeBits));
  }
  return result;
}

// The planes of a layer with n outputs.
void set_planes(PackedWeight& weight, const Inputs& planes) {
  for (int p = 0; p < weight.widths.count; ++p) {
    const Input& plane = planes[static_cast<std::size_t>(p)];
    const std::string name = "planes[" + std::to_string(p) + "]";
    weight.channels[p] = checked_size(plane, name.c_str(), 2, 0);
    weight.plane[p] = bytes(plane, name.c_str(), {kAnySize, plane_row_bytes(weight.n, weight.widths.width[p])});
  }
}

const std::int32_t* checked_order(const Input& channel_order, std::int64_t k) {
  const std::int32_t* values = ints(channel_order, "channel_order", {k});
  if (const Status status = check_permutation(values, k); !status.ok()) throw nb::value_error(status.message);
  return values;
}

PackedWeight packed_weight(const Inputs& planes, const Input& block_scale, const Input& row_scale, const Input& gain,
                           const Input& channel_order, const std::vector<int>& widths, std::int64_t block) {
  if (!is_block(block)) refuse("block is " + std::to_string(block) + ": allowed are 32, 64 and 128");
  PackedWeight weight;
  weight.widths = checked_widths(widths, planes.size());
  weight.block = block;
  weight.n = checked_size(row_scale, "row_scale", 1, 0);
  weight.k = checked_size(channel_order, "channel_order", 1, 0);
  set_planes(weight, planes);
  weight.block_scale = halves(block_scale, "block_scale", {weight.k, block_count(weight.n, block)});
  weight.row_scale = floats(row_scale, "row_scale", {weight.n});
  weight.gain = floats(gain, "gain", {weight.widths.count});
  weight.channel_order = checked_order(channel_order, weight.k);
  return weight;
}

const float* checked_channel_weight(const Input& channel_weight, std::int64_t k) {
  const float* values = floats(channel_weight, "channel_weight", {k});
  for (std::int64_t c = 0; c < k; ++c) {
    if (!(values[c] >= 0.0f) || std::isinf(values[c])) {
      refuse("channel_weight[" + std::to_string(c) + "] is " + std::to_string(values[c]) +
             ": allowed are finite numbers of at least 0");
    }
  }
  return values;
}

// Thresholds are [G], or [sections, G] where sections are given.
Grading checked_grading(const PackedWeight& weight, const Input& channel_weight, const Input& thresholds,
                        const std::optional<float>& budget, const std::vector<std::int64_t>& sections) {
  Grading grading;
  grading.channel_weight = checked_channel_weight(channel_weight, weight.k);
  if (sections.empty()) {
    grading.thresholds = floats(thresholds, "thresholds", {weight.widths.count});
  } else {
    const Status status = check_sections(sections.data(), static_cast<std::int64_t>(sections.size()), weight.n);
    if (!status.ok()) refuse(status.message);
    grading.sections.count = static_cast<int>(sections.size());
    std::copy(sections.begin(), sections.end(), grading.sections.size);
    grading.thresholds = floats(thresholds, "thresholds", {grading.sections.count, weight.widths.count});
  }
  if (budget) grading.budget = &*budget;
  return grading;
}

Isa isa_in_use() {
  Isa isa{};
  if (const Status status = current_isa(isa); !status.ok()) throw nb::value_error(status.message);
  return isa;
}

Isa checked_isa(const std::optional<std::string>& name) {
  if (!name) return isa_in_use();
  std::string allowed;
  for (const Isa isa : kIsas) {
    if (!isa_available(isa)) continue;
    if (*name == isa_name(isa)) return isa;
    allowed += (allowed.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  refuse("isa is '" + *name + "': allowed on this machine are " + allowed);
}

Output py_sort_channels(const Input& weight, const std::optional<Input>& mean_square) {
  SortParams params{};
  params.weight = floats(weight, "weight", {kAnySize, kAnySize});
  params.n = checked_size(weight, "weight", 2, 0);
  params.k = checked_size(weight, "weight", 2, 1);
  if (mean_square) params.mean_square = floats(*mean_square, "mean_square", {params.k});
  const Output order = new_array(Element::i32, {params.k});
  params.channel_order = static_cast<std::int32_t*>(order.data());
  call(sort_channels, params);
  return order;
}

std::tuple<Output, Output, Output, Output, Output> py_quantize(const Input& weight, const Input& channel_order,
                                                               std::int64_t block) {
  if (!is_block(block)) refuse("block is " + std::to_string(block) + ": allowed are 32, 64 and 128");
  QuantizeParams params{};
  params.weight = floats(weight, "weight", {kAnySize, kAnySize});
  params.n = checked_size(weight, "weight", 2, 0);
  params.k = checked_size(weight, "weight", 2, 1);
  params.block = block;
  params.channel_order = ints(channel_order, "channel_order", {params.k});
  const Output codes = new_array(Element::u8, {params.k, params.n});
  const Output block_scale = new_array(Element::f16, {params.k, block_count(params.n, block)});
  const Output row_scale = new_array(Element::f32, {params.n});
  const Output gain = new_array(Element::f32, {kCodeBits + 1});
  const Output channel_error = new_array(Element::f32, {kCodeBits + 1, params.k});
  params.codes = static_cast<std::uint8_t*>(codes.data());
  params.block_scale = static_cast<std::uint16_t*>(block_scale.data());
  params.row_scale = static_cast<float*>(row_scale.data());
  params.gain = static_cast<float*>(gain.data());
  params.channel_error = static_cast<float*>(channel_error.data());
  call(quantize, params);
  return {codes, block_scale, row_scale, gain, channel_error};
}

std::vector<Output> py_pack(const Input& codes, const std::vector<int>& widths,
                            const std::vector<std::int64_t>& channels) {
  PackParams params{};
  params.widths = checked_widths(widths, channels.size());
  params.codes = bytes(codes, "codes", {kAnySize, kAnySize});
  params.k = checked_size(codes, "codes", 2, 0);
  params.n = checked_size(codes, "codes", 2, 1);
  std::vector<Output> planes;
  for (int p = 0; p < params.widths.count; ++p) {
    const std::int64_t stored = channels[static_cast<std::size_t>(p)];
    if (stored < 0 || stored > params.k) {
      refuse("channels[" + std::to_string(p) + "] is " + std::to_string(stored) + ": allowed are 0 to " +
             std::to_string(params.k));
    }
    planes.push_back(new_array(Element::u8, {stored, plane_row_bytes(params.n, params.widths.width[p])}));
    params.channels[p] = stored;
    params.plane[p] = static_cast<std::uint8_t*>(planes.back().data());
  }
  call(pack, params);
  return planes;
}

Output py_unpack(const Inputs& planes, const std::vector<int>& widths, std::int64_t n, std::int64_t k) {
  if (n < 1) refuse("n is " + std::to_string(n) + ": allowed are numbers of at least 1");
  if (k < 1) refuse("k is " + std::to_string(k) + ": allowed are numbers of at least 1");
  PackedWeight weight;
  weight.widths = checked_widths(widths, planes.size());
  weight.n = n;
  set_planes(weight, planes);
  UnpackParams params{};
  params.n = n;
  params.k = k;
  params.widths = weight.widths;
  std::memcpy(params.channels, weight.channels, sizeof(params.channels));
  std::memcpy(params.plane, weight.plane, sizeof(params.plane));
  const Output codes = new_array(Element::u8, {k, n});
  params.codes = static_cast<std::uint8_t*>(codes.data());
  call(unpack, params);
  return codes;
}

Output py_grade(const Input& x, const Inputs& planes, const Input& channel_order, const Input& channel_weight,
                const Input& thresholds, const std::vector<int>& widths, const std::optional<float>& budget,
                const std::vector<std::int64_t>& sections) {
  GradeParams params{};
  params.weight.widths = checked_widths(widths, planes.size());
  params.weight.k = checked_size(channel_order, "channel_order", 1, 0);
  // Of n only the sections' proportions matter; without them it is not known here.
  params.weight.n = std::max<std::int64_t>(1, std::accumulate(sections.begin(), sections.end(), std::int64_t{0}));
  for (int p = 0; p < params.weight.widths.count; ++p) {
    const std::string name = "planes[" + std::to_string(p) + "]";
    params.weight.channels[p] = checked_size(planes[static_cast<std::size_t>(p)], name.c_str(), 2, 0);
  }
  params.weight.channel_order = checked_order(channel_order, params.weight.k);
  params.grading = checked_grading(params.weight, channel_weight, thresholds, budget, sections);
  const Element element = activation_element(x, "x");
  params.x = checked_data(x, "x", element, {kAnySize, params.weight.k});
  params.m = checked_size(x, "x", 2, 0);
  params.x_stride = params.weight.k;
  params.dtype = core_dtype(element);
  const Output grades = sections.empty()
                            ? new_array(Element::u8, {params.m, params.weight.k})
                            : new_array(Element::u8, {params.grading.sections.count, params.m, params.weight.k});
  params.grades = static_cast<std::uint8_t*>(grades.data());
  call(grade, params);
  return grades;
}

Output py_dequantize(const Inputs& planes, const Input& block_scale, const Input& row_scale, const Input& gain,
                     const Input& channel_order, const std::vector<int>& widths, std::int64_t block, int grade,
                     const std::string& dtype) {
  if (dtype != "float32" && dtype != "float16") {
    refuse("dtype is '" + dtype + "': allowed are 'float32' and 'float16'");
  }
  const Element element = dtype == "float16" ? Element::f16 : Element::f32;
  DequantizeParams params{};
  params.weight = packed_weight(planes, block_scale, row_scale, gain, channel_order, widths, block);
  params.grade = grade;
  params.n_begin = 0;
  params.n_end = params.weight.n;
  params.dtype = core_dtype(element);
  const Output out = new_array(element, {params.weight.k, params.weight.n});
  params.out = out.data();
  call(dequantize, params);
  return out;
}

std::tuple<Output, Output> py_gemv_read_bits(const Input& x, const Inputs& planes, const Input& block_scale,
                                             const Input& row_scale, const Input& gain, const Input& channel_order,
                                             const Input& channel_weight, const Input& thresholds,
                                             const std::vector<int>& widths, std::int64_t block,
                                             const std::optional<Input>& bias, const std::optional<float>& budget,
                                             const std::optional<std::string>& isa,
                                             const std::vector<std::int64_t>& sections) {
  GemvParams params{};
  params.weight = packed_weight(planes, block_scale, row_scale, gain, channel_order, widths, block);
  params.grading = checked_grading(params.weight, channel_weight, thresholds, budget, sections);
  const Element element = activation_element(x, "x");
  params.x = checked_data(x, "x", element, {kAnySize, params.weight.k});
  params.m = checked_size(x, "x", 2, 0);
  params.x_stride = params.weight.k;
  params.dtype = core_dtype(element);
  if (bias) params.bias = checked_data(*bias, "bias", element, {params.weight.n});
  params.isa = checked_isa(isa);
  const Output y = new_array(element, {params.m, params.weight.n});
  const Output read_bits = new_array(Element::f32, {params.m});
  params.y = y.data();
  params.read_bits = static_cast<float*>(read_bits.data());
  call(gemv, params);
  return {y, read_bits};
}

Output py_gemv(const Input& x, const Inputs& planes, const Input& block_scale, const Input& row_scale,
               const Input& gain, const Input& channel_order, const Input& channel_weight, const Input& thresholds,
               const std::vector<int>& widths, std::int64_t block, const std::optional<Input>& bias,
               const std::optional<float>& budget, const std::optional<std::string>& isa,
               const std::vector<std::int64_t>& sections) {
  return std::get<0>(py_gemv_read_bits(x, planes, block_scale, row_scale, gain, channel_order, channel_weight,
                                       thresholds, widths, block, bias, budget, isa, sections));
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kIsas) {
    if (isa_available(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

void py_set_num_threads(int count) {
  if (count < 1) refuse("count is " + std::to_string(count) + ": allowed are numbers of at least 1");
  set_num_threads(count);
}

}  // namespace
}  // namespace grinqh::python

NB_MODULE(_core, m) {
  using namespace grinqh::python;
  using nb::none;

  m.doc() = R"(The core of grinqh for NumPy arrays, without torch.

The functions, the arguments of a packed layer, their dtypes and shapes are those of the ops in docs/ops.md;
x is float32 or float16 [M, K]. Arrays are C-contiguous and on the CPU. An argument that is not allowed
raises a ValueError that names it. Python's lock is released while a function computes.)";

  m.attr("format_version") = grinqh::kFormatVersion;

  m.def("sort_channels", &py_sort_channels, "weight"_a, "mean_square"_a = none(),
        R"(The order of channels by falling importance, mean_square * energy of the column: int32 [K].

weight: float32 [N, K]. mean_square: float32 [K], or None for all ones.)");

  m.def("quantize", &py_quantize, "weight"_a, "channel_order"_a, "block"_a = 64,
        R"(Quantizes a layer to 8-bit codes, and measures what every number of bits 0..8 would lose.

weight: float32 [N, K]. channel_order: int32 [K], a permutation.
Returns codes uint8 [K, N], block_scale float16 [K, ceil(N / block)], row_scale float32 [N], gain float32 [9]
and channel_error float32 [9, K].)");

  m.def("pack", &py_pack, "codes"_a, "widths"_a, "channels"_a,
        R"(Cuts codes uint8 [K, N] into planes, uint8 [channels[p], ceil(N * widths[p] / 8)] each.)");

  m.def("unpack", &py_unpack, "planes"_a, "widths"_a, "n"_a, "k"_a,
        R"(Codes uint8 [k, n] from planes; bits that are not stored are 0.)");

  m.def("grade", &py_grade, "x"_a, "planes"_a, "channel_order"_a, "channel_weight"_a, "thresholds"_a, "widths"_a,
        "budget"_a = none(), "sections"_a = std::vector<std::int64_t>(),
        R"(The grade of each stored channel for each row of x: uint8 [M, K], or [sections, M, K] if those are given.)");

  m.def("dequantize", &py_dequantize, "planes"_a, "block_scale"_a, "row_scale"_a, "gain"_a, "channel_order"_a,
        "widths"_a, "block"_a, "grade"_a, "dtype"_a = "float32",
        R"(Dense weights at one grade: [K, N] of dtype 'float32' or 'float16', row j the input feature j.)");

  m.def("gemv", &py_gemv, "x"_a, "planes"_a, "block_scale"_a, "row_scale"_a, "gain"_a, "channel_order"_a,
        "channel_weight"_a, "thresholds"_a, "widths"_a, "block"_a, "bias"_a = none(), "budget"_a = none(),
        "isa"_a = none(), "sections"_a = std::vector<std::int64_t>(),
        R"(y [M, N] in x's dtype, every row of x graded on its own.

bias: [N] in x's dtype. budget: mean bits per weight that a row may read. isa: one of available_isas(), or None
for current_isa(). sections: numbers of outputs that have thresholds of their own, [sections, G] then.)");

  m.def("gemv_read_bits", &py_gemv_read_bits, "x"_a, "planes"_a, "block_scale"_a, "row_scale"_a, "gain"_a,
        "channel_order"_a, "channel_weight"_a, "thresholds"_a, "widths"_a, "block"_a, "bias"_a = none(),
        "budget"_a = none(), "isa"_a = none(), "sections"_a = std::vector<std::int64_t>(),
        R"(As gemv, and the mean bits read per weight for each row, float32 [M].)");

  m.def("available_isas", &available_isas, "Names of the instruction sets that this machine runs.");
  m.def(
      "current_isa", [] { return grinqh::isa_name(isa_in_use()); },
      "Name of the instruction set in use: the best available, or the one that GRINQH_CPU_ISA names.");
  m.def("num_threads", &num_threads, "Threads that the functions of this module share their work among.");
  m.def("set_num_threads", &py_set_num_threads, "count"_a, "Sets num_threads(); results do not depend on it.");
}
