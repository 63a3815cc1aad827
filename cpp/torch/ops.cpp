// torch.ops.grinqh: the schemas and the CPU kernels. docs/ops.md documents shapes and dtypes.
#include <algorithm>

#include "core/validate.h"
#include "ops_common.h"
#include "ops_convert.h"

namespace grinqh::binding {
namespace {

// The core's work on torch's own threads.
void run_on_torch_threads(int64_t count, int64_t grain, Executor::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
constexpr Executor kTorchThreads{run_on_torch_threads};

void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (bias.has_value()) check_tensor(op, "bias", *bias, x.scalar_type(), {n}, x);
}

void run_gemv(const char* op, const Tensor& x, const LayerArguments& layer, const Tensor& y, Tensor* read_bits) {
  GemvParams params{};
  params.dtype = to_dtype(op, "x", x.scalar_type());
  params.weight = to_packed(op, layer.packed(), x);
  params.grading = to_grading(op, layer, params.weight, x);
  check_bias(op, layer.bias, x, params.weight.n);
  const Rows rows = to_rows(op, x, params.weight.k);
  params.x = rows.x.const_data_ptr();
  params.m = rows.count;
  params.x_stride = rows.stride;
  params.bias = layer.bias.has_value() ? layer.bias->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.read_bits = read_bits != nullptr ? static_cast<float*>(read_bits->mutable_data_ptr()) : nullptr;
  throw_if_error(op, current_isa(params.isa));
  throw_if_error(op, gemv(params, kTorchThreads));
}

Tensor empty_output(const Tensor& x, const Tensor& row_scale) {
  STD_TORCH_CHECK(x.dim() >= 1, "grinqh: x has shape []: it must have at least one dimension");
  STD_TORCH_CHECK(row_scale.dim() == 1, "grinqh: row_scale has shape ", shape_text(row_scale), ": it must be [N]");
  return torch::stable::new_empty(x, output_sizes(x, row_scale.size(0)));
}

Tensor gemv_cpu(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  Tensor y = empty_output(x, row_scale);
  run_gemv("gemv", x, layer, y, nullptr);
  return y;
}

void gemv_out_cpu(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections, Tensor out) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  STD_TORCH_CHECK(x.dim() >= 1 && out.dim() == x.dim(), "grinqh::gemv: out has shape ", shape_text(out),
                  ": it must be that of x, ", shape_text(x), ", with N as its last size");
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    STD_TORCH_CHECK(out.size(d) == x.size(d), "grinqh::gemv: out has shape ", shape_text(out),
                    ": it must be that of x, ", shape_text(x), ", with N as its last size");
  }
  STD_TORCH_CHECK(row_scale.dim() == 1 && out.size(out.dim() - 1) == row_scale.size(0), "grinqh::gemv: out has shape ",
                  shape_text(out), ": its last size must be N, the length of row_scale ", shape_text(row_scale));
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.is_contiguous() && out.is_cpu(), "grinqh::gemv: out is ",
                  dtype_name(out.scalar_type()), " on ", device_text(out), ": it must be contiguous, ",
                  dtype_name(x.scalar_type()), " and on ", device_text(x));
  run_gemv("gemv", x, layer, out, nullptr);
}

std::tuple<Tensor, Tensor> gemv_read_bits_cpu(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  Tensor y = empty_output(x, row_scale);
  Tensor read_bits = torch::stable::new_empty(x, leading_sizes(x), ScalarType::Float);
  run_gemv("gemv_read_bits", x, layer, y, &read_bits);
  return {y, read_bits};
}

// Prefill: a strip of outputs is made dense and multiplied: wide enough that channels are read in long runs, small
// enough that malloc keeps the memory (fresh pages would cost more than what is written to them). One buffer
// serves all strips.
constexpr int64_t kStripBytes = int64_t{24} << 20;

class DenseStrips {
 public:
  DenseStrips(const PackedWeight& weight, const Tensor& like, Dtype dtype) : weight_(weight), dtype_(dtype) {
    const int64_t item = dtype == Dtype::f32 ? 4 : 2;
    width_ = std::max<int64_t>(kStripBytes / (weight.k * item) / 128 * 128, 128);
    buffer_ = torch::stable::new_empty(like, {weight.k * std::min(width_, weight.n)});
  }
  int64_t width() const { return width_; }
  // Weights [K, end - begin] of these outputs, until the next call.
  Tensor strip(int64_t begin, int64_t end) {
    Tensor part = torch::stable::narrow(buffer_, 0, 0, weight_.k * (end - begin));
    const DequantizeParams params{weight_, weight_.widths.count, begin, end, dtype_, part.mutable_data_ptr()};
    throw_if_error("linear", dequantize(params, kTorchThreads));
    return torch::stable::view(part, {weight_.k, end - begin});
  }

 private:
  const PackedWeight& weight_;
  Dtype dtype_;
  int64_t width_;
  Tensor buffer_;
};

Tensor linear_cpu(Tensor x, GRINQH_LAYER_PARAMETERS, int64_t max_graded_rows, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  Tensor y = empty_output(x, row_scale);
  const PackedWeight weight = to_packed("linear", layer.packed(), x);
  const Rows rows = to_rows("linear", x, weight.k);
  if (rows.count <= max_graded_rows) {
    run_gemv("linear", x, layer, y, nullptr);
    return y;
  }
  const Dtype dtype = to_dtype("linear", "x", x.scalar_type());
  const Grading grading = to_grading("linear", layer, weight, x);
  throw_if_error("linear", check_grading(grading, weight.widths, weight.n));
  check_bias("linear", layer.bias, x, weight.n);
  const Tensor x_rows = torch::stable::reshape(x, {rows.count, weight.k});
  Tensor y_rows = torch::stable::view(y, {rows.count, weight.n});
  DenseStrips dense(weight, x, dtype);
  for (int64_t n = 0; n < weight.n; n += dense.width()) {
    const int64_t end = std::min(weight.n, n + dense.width());
    Tensor product = torch::stable::matmul(x_rows, dense.strip(n, end));
    if (layer.bias.has_value()) {
      Tensor bias_part = *layer.bias;
      product = torch::stable::subtract(product, torch::stable::narrow(bias_part, 0, n, end - n), -1.0);
    }
    Tensor part = torch::stable::narrow(y_rows, 1, n, end - n);
    torch::stable::copy_(part, product);
  }
  return y;
}

Tensor prepare_cpu(Tensor x, std::optional<Tensor> norm_weight, double norm_eps, bool gated) {
  PrepareParams params{};
  params.dtype = to_dtype("prepare", "x", x.scalar_type());
  params.transform = to_transform("prepare", x, norm_weight, norm_eps, gated, &params.k);
  const Rows rows = to_rows("prepare", x, gated ? 2 * params.k : params.k);
  params.x = rows.x.const_data_ptr();
  params.m = rows.count;
  params.x_stride = rows.stride;
  Tensor out = torch::stable::new_empty(x, output_sizes(x, params.k));
  params.out = out.mutable_data_ptr();
  throw_if_error("prepare", prepare(params, kTorchThreads));
  return out;
}

Tensor fused_linear_cpu(Tensor x, GRINQH_LAYER_PARAMETERS, int64_t max_graded_rows, std::optional<Tensor> norm_weight,
                        double norm_eps, bool gated, std::optional<Tensor> residual, std::vector<int64_t> sections) {
  const bool plain = !norm_weight.has_value() && !gated;
  const Tensor input = plain ? x : prepare_cpu(x, norm_weight, norm_eps, gated);
  Tensor y = linear_cpu(input, planes, block_scale, row_scale, gain, channel_order, channel_weight, thresholds, widths,
                        block, bias, budget, max_graded_rows, sections);
  if (!residual.has_value()) return y;
  check_residual("fused_linear", *residual, y);
  return torch::stable::subtract(y, *residual, -1.0);
}

Tensor sort_channels_cpu(Tensor weight, std::optional<Tensor> mean_square) {
  return sort_channels_with(weight, mean_square,
                            [](const SortParams& params) { return sort_channels(params, kTorchThreads); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_cpu(Tensor weight, Tensor channel_order, int64_t block) {
  return quantize_with(weight, channel_order, block,
                       [](const QuantizeParams& params) { return quantize(params, kTorchThreads); });
}

std::vector<Tensor> pack_cpu(Tensor codes, std::vector<int64_t> widths, std::vector<int64_t> channels) {
  return pack_with(codes, widths, channels, [](const PackParams& params) { return pack(params, kTorchThreads); });
}

Tensor unpack_cpu(std::vector<Tensor> planes, std::vector<int64_t> widths, int64_t n, int64_t k) {
  return unpack_with(planes, widths, n, k, [](const UnpackParams& params) { return unpack(params, kTorchThreads); });
}

Tensor grade_cpu(Tensor x, std::vector<Tensor> planes, Tensor channel_order, Tensor channel_weight, Tensor thresholds,
                 std::vector<int64_t> widths, std::optional<Tensor> budget, std::vector<int64_t> sections) {
  GradeParams params{};
  params.dtype = to_dtype("grade", "x", x.scalar_type());
  check_tensor("grade", "channel_order", channel_order, ScalarType::Int, {-1}, x);
  PackedWeight& weight = params.weight;
  weight.widths = to_widths("grade", widths);
  weight.k = channel_order.size(0);
  weight.n = graded_outputs(sections);
  weight.channel_order = static_cast<const int32_t*>(channel_order.const_data_ptr());
  STD_TORCH_CHECK(planes.size() == widths.size(), "grinqh::grade: planes has ", planes.size(), " tensors and widths ",
                  widths.size(), " entries: they must be as many");
  for (size_t p = 0; p < planes.size(); ++p) {
    check_tensor("grade", "planes[" + std::to_string(p) + "]", planes[p], ScalarType::Byte, {-1, -1}, x);
    weight.channels[p] = planes[p].size(0);
  }
  params.grading = to_grading("grade", channel_weight, thresholds, budget, sections, weight, x);
  const Rows rows = to_rows("grade", x, weight.k);
  params.x = rows.x.const_data_ptr();
  params.m = rows.count;
  params.x_stride = rows.stride;
  Tensor grades = torch::stable::new_empty(x, grade_sizes(x, sections, weight.k), ScalarType::Byte);
  params.grades = static_cast<uint8_t*>(grades.mutable_data_ptr());
  throw_if_error("grade", grade(params, kTorchThreads));
  return grades;
}

Tensor dequantize_cpu(std::vector<Tensor> planes, Tensor block_scale, Tensor row_scale, Tensor gain,
                      Tensor channel_order, std::vector<int64_t> widths, int64_t block, int64_t grade,
                      ScalarType dtype) {
  DequantizeParams params{};
  params.weight =
      to_packed("dequantize", {planes, block_scale, row_scale, gain, channel_order, widths, block}, row_scale);
  STD_TORCH_CHECK(grade >= 0 && grade <= params.weight.widths.count, "grinqh::dequantize: grade is ", grade,
                  ": allowed are 0 to ", params.weight.widths.count);
  params.grade = static_cast<int>(grade);
  params.n_end = params.weight.n;
  params.dtype = to_dtype("dequantize", "dtype", dtype);
  Tensor dense = torch::stable::new_empty(row_scale, {params.weight.k, params.weight.n}, dtype);
  params.out = dense.mutable_data_ptr();
  throw_if_error("dequantize", dequantize(params, kTorchThreads));
  return dense;
}

std::string cpu_isa() {
  Isa isa{};
  throw_if_error("cpu_isa", current_isa(isa));
  return isa_name(isa);
}

}  // namespace
}  // namespace grinqh::binding

#define GRINQH_LAYER                                                                                  \
  "Tensor[] planes, Tensor block_scale, Tensor row_scale, Tensor gain, Tensor channel_order, Tensor " \
  "channel_weight, Tensor thresholds, int[] widths, int block, Tensor? bias=None, Tensor? budget=None"

// Without defaults, for a schema where more arguments follow.
#define GRINQH_LAYER_ALL                                                                              \
  "Tensor[] planes, Tensor block_scale, Tensor row_scale, Tensor gain, Tensor channel_order, Tensor " \
  "channel_weight, Tensor thresholds, int[] widths, int block, Tensor? bias, Tensor? budget"

STABLE_TORCH_LIBRARY(grinqh, m) {
  m.def("gemv(Tensor x, " GRINQH_LAYER ", int[] sections=[]) -> Tensor");
  m.def("gemv.out(Tensor x, " GRINQH_LAYER ", int[] sections=[], *, Tensor(a!) out) -> ()");
  m.def("gemv_read_bits(Tensor x, " GRINQH_LAYER ", int[] sections=[]) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, " GRINQH_LAYER ", int max_graded_rows=8, int[] sections=[]) -> Tensor");
  m.def("prepare(Tensor x, Tensor? norm_weight=None, float norm_eps=0.0, bool gated=False) -> Tensor");
  m.def("fused_linear(Tensor x, " GRINQH_LAYER_ALL
        ", int max_graded_rows, Tensor? norm_weight=None, float norm_eps=0.0, bool gated=False, Tensor? "
        "residual=None, int[] sections=[]) -> Tensor");
  m.def("sort_channels(Tensor weight, Tensor? mean_square=None) -> Tensor");
  m.def("quantize(Tensor weight, Tensor channel_order, int block=64) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pack(Tensor codes, int[] widths, int[] channels) -> Tensor[]");
  m.def("unpack(Tensor[] planes, int[] widths, int n, int k) -> Tensor");
  m.def(
      "grade(Tensor x, Tensor[] planes, Tensor channel_order, Tensor channel_weight, Tensor thresholds, int[] widths, "
      "Tensor? budget=None, int[] sections=[]) -> Tensor");
  m.def(
      "dequantize(Tensor[] planes, Tensor block_scale, Tensor row_scale, Tensor gain, Tensor channel_order, int[] "
      "widths, int block, int grade, ScalarType dtype) -> Tensor");
  m.def("repack(Tensor[] planes, Tensor block_scale, int[] widths, int n, int block) -> (Tensor[], Tensor)");
  m.def("unpack_tiles(Tensor[] planes, Tensor block_scale, int[] widths, int n, int block) -> (Tensor[], Tensor)");
  m.def("decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(grinqh, CPU, m) {
  namespace binding = grinqh::binding;
  m.impl("gemv", TORCH_BOX(&binding::gemv_cpu));
  m.impl("gemv.out", TORCH_BOX(&binding::gemv_out_cpu));
  m.impl("gemv_read_bits", TORCH_BOX(&binding::gemv_read_bits_cpu));
  m.impl("linear", TORCH_BOX(&binding::linear_cpu));
  m.impl("prepare", TORCH_BOX(&binding::prepare_cpu));
  m.impl("fused_linear", TORCH_BOX(&binding::fused_linear_cpu));
  m.impl("sort_channels", TORCH_BOX(&binding::sort_channels_cpu));
  m.impl("quantize", TORCH_BOX(&binding::quantize_cpu));
  m.impl("pack", TORCH_BOX(&binding::pack_cpu));
  m.impl("unpack", TORCH_BOX(&binding::unpack_cpu));
  m.impl("grade", TORCH_BOX(&binding::grade_cpu));
  m.impl("dequantize", TORCH_BOX(&binding::dequantize_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(grinqh, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&grinqh::binding::cpu_isa));
}
