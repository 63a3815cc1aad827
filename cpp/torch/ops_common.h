// From torch::stable::Tensor to the core's structs, with the checks that only torch's tensors need.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "core/validate.h"
#include "grinqh/core.h"

namespace grinqh::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void throw_if_error(const char* op, const Status& status) {
  STD_TORCH_CHECK(status.ok(), "grinqh::", op, ": ", status.message);
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline std::string device_text(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline std::string wanted_text(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  return text + "]";
}

// A contiguous tensor of this dtype and shape, on the device of `like`. A size of -1 allows any.
inline void check_tensor(const char* op, const std::string& name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "grinqh::", op, ": ", name, " is ", dtype_name(tensor.scalar_type()),
                  ": it must be ", dtype_name(dtype));
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) {
    const int64_t size = shape.begin()[d];
    fits = size < 0 || tensor.size(static_cast<int64_t>(d)) == size;
  }
  STD_TORCH_CHECK(fits, "grinqh::", op, ": ", name, " has shape ", shape_text(tensor), ": it must be ",
                  wanted_text(shape));
  STD_TORCH_CHECK(tensor.is_contiguous(), "grinqh::", op, ": ", name, " is not contiguous: it must be");
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
                  "grinqh::", op, ": ", name, " is on ", device_text(tensor), ": it must be on ", device_text(like));
}

inline Dtype to_dtype(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default:
      STD_TORCH_CHECK(false, "grinqh::", op, ": ", name, " is ", dtype_name(type),
                      ": allowed are float32, float16 and bfloat16");
  }
}

inline PlaneWidths to_widths(const char* op, const std::vector<int64_t>& widths) {
  STD_TORCH_CHECK(!widths.empty() && widths.size() <= kMaxPlanes, "grinqh::", op, ": widths has ", widths.size(),
                  " entries: allowed are 1 to ", kMaxPlanes);
  PlaneWidths result;
  result.count = static_cast<int>(widths.size());
  for (size_t p = 0; p < widths.size(); ++p) {
    STD_TORCH_CHECK(widths[p] >= 1 && widths[p] <= kCodeBits && is_plane_width(static_cast<int>(widths[p])),
                    "grinqh::", op, ": widths[", p, "] is ", widths[p], ": allowed are 1, 2, 4 and 8");
    result.width[p] = static_cast<int>(widths[p]);
  }
  STD_TORCH_CHECK(result.valid(), "grinqh::", op, ": widths add up to ", result.bits(result.count),
                  ": allowed are at most ", kCodeBits, " bits");
  return result;
}

// A stored prefix of planes: uint8 [K_p, row bytes], K_p never growing.
inline void add_planes(const char* op, const std::vector<Tensor>& planes, const Tensor& like, PackedWeight& weight) {
  STD_TORCH_CHECK(static_cast<int>(planes.size()) == weight.widths.count, "grinqh::", op, ": planes has ",
                  planes.size(), " tensors and widths ", weight.widths.count, " entries: they must be as many");
  int64_t most = weight.k;
  for (size_t p = 0; p < planes.size(); ++p) {
    const std::string name = "planes[" + std::to_string(p) + "]";
    check_tensor(op, name, planes[p], ScalarType::Byte, {-1, plane_row_bytes(weight.n, weight.widths.width[p])}, like);
    STD_TORCH_CHECK(planes[p].size(0) <= most, "grinqh::", op, ": ", name, " stores ", planes[p].size(0),
                    " channels: allowed are at most ", most);
    most = weight.channels[p] = planes[p].size(0);
    weight.plane[p] = static_cast<const uint8_t*>(planes[p].const_data_ptr());
  }
}

// The tensors of a packed layer, as the ops take them (docs/ops.md).
struct PackedTensors {
  const std::vector<Tensor>& planes;
  const Tensor& block_scale;
  const Tensor& row_scale;
  const Tensor& gain;
  const Tensor& channel_order;
  const std::vector<int64_t>& widths;
  int64_t block;
};

// A layer's tensors in the order of the schemas, those that an op was called with.
struct LayerArguments {
  const std::vector<Tensor>& planes;
  const Tensor &block_scale, &row_scale, &gain, &channel_order, &channel_weight, &thresholds;
  const std::vector<int64_t>& widths;
  int64_t block;
  const std::optional<Tensor>&bias, &budget;
  const std::vector<int64_t>& sections;

  PackedTensors packed() const { return {planes, block_scale, row_scale, gain, channel_order, widths, block}; }
};
#define GRINQH_LAYER_PARAMETERS                                                                        \
  std::vector<Tensor> planes, Tensor block_scale, Tensor row_scale, Tensor gain, Tensor channel_order, \
      Tensor channel_weight, Tensor thresholds, std::vector<int64_t> widths, int64_t block,            \
      std::optional<Tensor> bias, std::optional<Tensor> budget
// `sections` is the schemas' last argument.
#define GRINQH_LAYER_ARGUMENTS                                                                                    \
  LayerArguments {                                                                                                \
    planes, block_scale, row_scale, gain, channel_order, channel_weight, thresholds, widths, block, bias, budget, \
        sections                                                                                                  \
  }

inline PackedWeight to_packed(const char* op, const PackedTensors& tensors, const Tensor& like) {
  STD_TORCH_CHECK(is_block(tensors.block), "grinqh::", op, ": block is ", tensors.block,
                  ": allowed are 32, 64 and 128");
  PackedWeight weight;
  weight.widths = to_widths(op, tensors.widths);
  check_tensor(op, "row_scale", tensors.row_scale, ScalarType::Float, {-1}, like);
  check_tensor(op, "channel_order", tensors.channel_order, ScalarType::Int, {-1}, like);
  weight.n = tensors.row_scale.size(0);
  weight.k = tensors.channel_order.size(0);
  weight.block = tensors.block;
  check_tensor(op, "block_scale", tensors.block_scale, ScalarType::Half,
               {weight.k, block_count(weight.n, weight.block)}, like);
  check_tensor(op, "gain", tensors.gain, ScalarType::Float, {weight.widths.count}, like);
  add_planes(op, tensors.planes, like, weight);
  weight.block_scale = static_cast<const uint16_t*>(tensors.block_scale.const_data_ptr());
  weight.row_scale = static_cast<const float*>(tensors.row_scale.const_data_ptr());
  weight.gain = static_cast<const float*>(tensors.gain.const_data_ptr());
  weight.channel_order = static_cast<const int32_t*>(tensors.channel_order.const_data_ptr());
  return weight;
}

inline Sections to_sections(const char* op, const std::vector<int64_t>& sizes, int64_t n) {
  Sections sections;
  if (sizes.empty()) return sections;
  throw_if_error(op, check_sections(sizes.data(), static_cast<int64_t>(sizes.size()), n));
  sections.count = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), sections.size);
  return sections;
}

// Thresholds are [G], or [sections, G] where sections are given.
inline Grading to_grading(const char* op, const Tensor& channel_weight, const Tensor& thresholds,
                          const std::optional<Tensor>& budget, const std::vector<int64_t>& sections,
                          const PackedWeight& weight, const Tensor& like) {
  Grading grading;
  grading.sections = to_sections(op, sections, weight.n);
  check_tensor(op, "channel_weight", channel_weight, ScalarType::Float, {weight.k}, like);
  if (sections.empty()) {
    check_tensor(op, "thresholds", thresholds, ScalarType::Float, {weight.widths.count}, like);
  } else {
    check_tensor(op, "thresholds", thresholds, ScalarType::Float, {grading.sections.count, weight.widths.count}, like);
  }
  if (budget.has_value()) check_tensor(op, "budget", *budget, ScalarType::Float, {1}, like);
  grading.channel_weight = static_cast<const float*>(channel_weight.const_data_ptr());
  grading.thresholds = static_cast<const float*>(thresholds.const_data_ptr());
  grading.budget = budget.has_value() ? static_cast<const float*>(budget->const_data_ptr()) : nullptr;
  return grading;
}

inline Grading to_grading(const char* op, const LayerArguments& layer, const PackedWeight& weight, const Tensor& like) {
  return to_grading(op, layer.channel_weight, layer.thresholds, layer.budget, layer.sections, weight, like);
}

// Sizes of an op's `grades`: [..., K] like x, behind the sections where some are given.
inline std::vector<int64_t> grade_sizes(const Tensor& x, const std::vector<int64_t>& sections, int64_t k) {
  std::vector<int64_t> sizes;
  if (!sections.empty()) sizes.push_back(static_cast<int64_t>(sections.size()));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(k);
  return sizes;
}

// The number of outputs that `grade` is told of: it needs no more than the sections' proportions.
inline int64_t graded_outputs(const std::vector<int64_t>& sections) {
  int64_t n = 0;
  for (const int64_t size : sections) n += size;
  return sections.empty() ? 1 : n;
}

// x [..., K] as rows: contiguous values in a row, a fixed stride from row to row.
struct Rows {
  Tensor x;  // keeps a copy alive where one was needed
  int64_t count = 0;
  int64_t stride = 0;
};

inline int64_t row_count(const char* op, const Tensor& x, int64_t k) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "grinqh::", op, ": x has shape ", shape_text(x),
                  ": its last size must be ", k);
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
  return count;
}

inline Rows to_rows(const char* op, const Tensor& x, int64_t k) {
  const int64_t count = row_count(op, x, k);
  if (x.is_contiguous()) return {x, count, k};
  if (x.dim() == 2 && (x.stride(1) == 1 || k == 1) && x.stride(0) >= 0) return {x, count, x.stride(0)};
  return {torch::stable::contiguous(x), count, k};
}

// What `prepare` and `fused_linear` do to x [..., K], or [..., 2K] where it is gated; sets K.
inline InputTransform to_transform(const char* op, const Tensor& x, const std::optional<Tensor>& norm_weight,
                                   double norm_eps, bool gated, int64_t* k) {
  STD_TORCH_CHECK(x.dim() >= 1, "grinqh::", op, ": x has shape []: it must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(!gated || width % 2 == 0, "grinqh::", op, ": x has shape ", shape_text(x),
                  ": its last size must be even, half of it gates");
  *k = gated ? width / 2 : width;
  InputTransform transform;
  transform.gated = gated;
  transform.norm_eps = static_cast<float>(norm_eps);
  if (norm_weight.has_value()) {
    check_tensor(op, "norm_weight", *norm_weight, x.scalar_type(), {*k}, x);
    transform.norm_weight = norm_weight->const_data_ptr();
  }
  return transform;
}

inline void check_residual(const char* op, const Tensor& residual, const Tensor& y) {
  bool fits = residual.dim() == y.dim() && residual.scalar_type() == y.scalar_type();
  for (int64_t d = 0; fits && d < y.dim(); ++d) fits = residual.size(d) == y.size(d);
  STD_TORCH_CHECK(fits, "grinqh::", op, ": residual is ", dtype_name(residual.scalar_type()), " of shape ",
                  shape_text(residual), ": it must be ", dtype_name(y.scalar_type()), " of shape ", shape_text(y));
  STD_TORCH_CHECK(residual.is_cpu() == y.is_cpu() && residual.get_device_index() == y.get_device_index(),
                  "grinqh::", op, ": residual is on ", device_text(residual), ": it must be on ", device_text(y));
}

inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

inline std::vector<int64_t> output_sizes(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(n);
  return sizes;
}

}  // namespace grinqh::binding
