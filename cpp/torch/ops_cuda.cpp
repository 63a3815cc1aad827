// torch.ops.grinqh on CUDA tensors. Planes and block scales are in tile order here (cuda/layout.h): `repack`
// makes them at load time, `unpack_tiles` gives the canonical ones back.

#include <algorithm>

#include "counters.h"
#include "cuda_common.h"
#include "kernels.h"
#include "product.h"

namespace grinqh::binding {
namespace {

PackedWeight to_tiled(const char* op, const PackedTensors& tensors, const Tensor& like) {
  check_block(op, tensors.block);
  PackedWeight weight;
  weight.widths = to_widths(op, tensors.widths);
  check_tensor(op, "row_scale", tensors.row_scale, ScalarType::Float, {-1}, like);
  check_tensor(op, "channel_order", tensors.channel_order, ScalarType::Int, {-1}, like);
  weight.n = tensors.row_scale.size(0);
  weight.k = tensors.channel_order.size(0);
  weight.block = tensors.block;
  STD_TORCH_CHECK(weight.n < (int64_t{1} << 31) && weight.k < (int64_t{1} << 26), "grinqh::", op, ": N is ", weight.n,
                  " and K ", weight.k, ": allowed are N < 2^31 and K < 2^26");
  add_tiled_planes(op, tensors.planes, like, weight);
  check_tensor(op, "block_scale", tensors.block_scale, ScalarType::Half,
               {cuda::tile_count(weight.n) * cuda::blocks_per_tile(static_cast<int>(weight.block)) + 1, weight.k},
               like);
  check_tensor(op, "gain", tensors.gain, ScalarType::Float, {weight.widths.count}, like);
  weight.block_scale = static_cast<const uint16_t*>(tensors.block_scale.const_data_ptr());
  weight.row_scale = static_cast<const float*>(tensors.row_scale.const_data_ptr());
  weight.gain = static_cast<const float*>(tensors.gain.const_data_ptr());
  weight.channel_order = static_cast<const int32_t*>(tensors.channel_order.const_data_ptr());
  return weight;
}

PackedWeight to_tiled(const char* op, const LayerArguments& layer, const Tensor& like) {
  return to_tiled(
      op,
      {layer.planes, layer.block_scale, layer.row_scale, layer.gain, layer.channel_order, layer.widths, layer.block},
      like);
}

cuda::GradeParams grade_params(const Rows& rows, Dtype dtype, const PackedWeight& weight, const Grading& grading) {
  cuda::GradeParams params{};
  params.x = rows.x.const_data_ptr();
  params.m = rows.count;
  params.x_stride = rows.stride;
  params.dtype = dtype;
  params.weight = weight;
  params.grading = grading;
  return params;
}

// The rows' factors where there is a budget. The tensor keeps them alive.
std::optional<Tensor> fit_budget(const char* op, cuda::GradeParams& params, const Tensor& like, cudaStream_t stream) {
  if (params.grading.budget == nullptr) return std::nullopt;
  Tensor factor = torch::stable::new_empty(like, {params.m}, ScalarType::Float);
  throw_if_error(op, cuda::fit_budget(params, static_cast<float*>(factor.mutable_data_ptr()), stream));
  params.factor = static_cast<const float*>(factor.const_data_ptr());
  return factor;
}

// Planning takes microseconds; a model asks for few shapes, again and again.
cuda::GemvPlan plan_for(const cuda::GemvShape& shape, const cuda::Gpu& gpu) {
  struct Known {
    cuda::GemvShape shape;
    cuda::Gpu gpu;
    cuda::GemvPlan plan;
  };
  thread_local Known known[64];
  Known& slot = known[static_cast<size_t>(shape.n * 31 + shape.k * 7 + shape.m) % 64];
  if (!(slot.shape == shape && slot.gpu == gpu)) slot = {shape, gpu, cuda::plan_gemv(shape, gpu)};
  return slot.plan;
}

cuda::GemvShape shape_of(const PackedWeight& weight, const Sections& sections, int64_t m) {
  cuda::GemvShape shape{weight.n, weight.k, m, 0, false, sections, static_cast<int>(weight.block)};
  for (int p = 0; p < weight.widths.count; ++p) {
    shape.subplanes += cuda::sub_count(weight.widths.width[p]);
    shape.one_bit = shape.one_bit || weight.widths.width[p] == 1;
  }
  return shape;
}

void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (bias.has_value()) check_tensor(op, "bias", *bias, x.scalar_type(), {n}, x);
}

// What fused_linear does beside the product.
struct Around {
  InputTransform transform;
  const void* residual = nullptr;  // [rows][n]
};

void run_gemv(const char* op, const Tensor& x, const LayerArguments& layer, Tensor& y, Tensor* read_bits,
              const Around& around = {}) {
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_of(x);
  const PackedWeight weight = to_tiled(op, layer, x);
  const Grading grading = to_grading(op, layer, weight, x);
  check_bias(op, layer.bias, x, weight.n);
  const Dtype dtype = to_dtype(op, "x", x.scalar_type());
  const Rows rows = to_rows(op, x, around.transform.gated ? 2 * weight.k : weight.k);
  if (rows.count == 0) return;

  cuda::GradeParams graded = grade_params(rows, dtype, weight, grading);
  const std::optional<Tensor> factor = fit_budget(op, graded, x, stream);
  if (read_bits != nullptr) {
    graded.read_bits = static_cast<float*>(read_bits->mutable_data_ptr());
    throw_if_error(op, cuda::grade(graded, stream));
  }
  if (weight.n == 0) return;
  STD_TORCH_CHECK(weight.k > 0, "grinqh::", op, ": K is 0: it must be at least 1");

  cuda::Gpu gpu;
  cuda::GemvParams params{};
  throw_if_error(op, cuda::current_gpu(&gpu, &params.overlap));
  params.x = graded.x;
  params.m = rows.count;
  params.x_stride = rows.stride;
  params.dtype = dtype;
  params.weight = weight;
  params.grading = grading;
  params.factor = graded.factor;
  params.bias = layer.bias.has_value() ? layer.bias->const_data_ptr() : nullptr;
  params.transform = around.transform;
  params.residual = around.residual;
  params.y = y.mutable_data_ptr();
  params.plan = plan_for(shape_of(weight, grading.sections, rows.count), gpu);
  const Tensor partial =
      torch::stable::new_empty(x, {cuda::gemv_partial_count(params.plan, rows.count)}, ScalarType::Float);
  params.partial = static_cast<float*>(partial.mutable_data_ptr());
  throw_if_error(op, cuda::counters_for(stream, cuda::gemv_counter_count(params.plan, rows.count), &params.arrivals));
  throw_if_error(op, cuda::gemv(params, stream));
}

Tensor empty_output(const Tensor& x, const Tensor& row_scale) {
  STD_TORCH_CHECK(x.dim() >= 1, "grinqh: x has shape []: it must have at least one dimension");
  STD_TORCH_CHECK(row_scale.dim() == 1, "grinqh: row_scale has shape ", shape_text(row_scale), ": it must be [N]");
  return torch::stable::new_empty(x, output_sizes(x, row_scale.size(0)));
}

Tensor gemv_cuda(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  Tensor y = empty_output(x, row_scale);
  run_gemv("gemv", x, layer, y, nullptr);
  return y;
}

void gemv_out_cuda(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections, Tensor out) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  bool fits =
      x.dim() >= 1 && out.dim() == x.dim() && row_scale.dim() == 1 && out.size(out.dim() - 1) == row_scale.size(0);
  for (int64_t d = 0; fits && d + 1 < x.dim(); ++d) fits = out.size(d) == x.size(d);
  STD_TORCH_CHECK(fits, "grinqh::gemv: out has shape ", shape_text(out), ": it must be that of x, ", shape_text(x),
                  ", with N, the length of row_scale ", shape_text(row_scale), ", as its last size");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.is_contiguous() &&
                      out.get_device_index() == x.get_device_index() && out.is_cuda(),
                  "grinqh::gemv: out is ", dtype_name(out.scalar_type()), " on ", device_text(out),
                  ": it must be contiguous, ", dtype_name(x.scalar_type()), " and on ", device_text(x));
  run_gemv("gemv", x, layer, out, nullptr);
}

std::tuple<Tensor, Tensor> gemv_read_bits_cuda(Tensor x, GRINQH_LAYER_PARAMETERS, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  Tensor y = empty_output(x, row_scale);
  Tensor read_bits = torch::stable::new_empty(x, leading_sizes(x), ScalarType::Float);
  run_gemv("gemv_read_bits", x, layer, y, &read_bits);
  return {y, read_bits};
}

Tensor dense_tiles(const char* op, const PackedWeight& weight, const Tensor& like, ScalarType type, int grade,
                   int64_t tile_begin, int64_t tile_end) {
  cuda::DequantizeParams params{};
  params.weight = weight;
  params.grade = grade;
  params.tile_begin = tile_begin;
  params.tile_end = tile_end;
  params.dtype = to_dtype(op, "dtype", type);
  const int64_t outputs = std::min(tile_end * cuda::kTile, weight.n) - tile_begin * cuda::kTile;
  Tensor dense = torch::stable::new_empty(like, {weight.k, outputs}, type);
  params.out = dense.mutable_data_ptr();
  throw_if_error(op, cuda::dequantize(params, stream_of(like)));
  return dense;
}

// Outputs are made dense in strips of at most this many weights, and multiplied.
constexpr int64_t kStripWeights = int64_t{1} << 27;

// The product of x with the outputs of some tiles, their bias added.
Tensor dense_product(const Tensor& x, const PackedWeight& weight, const std::optional<Tensor>& bias, int64_t tile_begin,
                     int64_t tile_end) {
  const Tensor dense = dense_tiles("linear", weight, x, x.scalar_type(), weight.widths.count, tile_begin, tile_end);
  Tensor product = torch::stable::matmul(x, dense);
  if (!bias.has_value()) return product;
  Tensor part = *bias;
  if (dense.size(1) < weight.n) part = torch::stable::narrow(part, 0, tile_begin * cuda::kTile, dense.size(1));
  return torch::stable::subtract(product, part, -1.0);
}

Tensor dense_linear(const Tensor& x, const PackedWeight& weight, const std::optional<Tensor>& bias) {
  const int64_t tiles = cuda::tile_count(weight.n);
  const int64_t strip = std::max<int64_t>(1, kStripWeights / (std::max<int64_t>(weight.k, 1) * cuda::kTile));
  // Nearly every layer is one strip, whose product is the result: each call of torch costs the processor microseconds,
  // which shorter prompts do not hide.
  if (tiles <= strip) return dense_product(x, weight, bias, 0, tiles);
  Tensor y = torch::stable::new_empty(x, output_sizes(x, weight.n));
  for (int64_t tile = 0; tile < tiles; tile += strip) {
    const Tensor product = dense_product(x, weight, bias, tile, std::min(tiles, tile + strip));
    Tensor part = torch::stable::narrow(y, y.dim() - 1, tile * cuda::kTile, product.size(product.dim() - 1));
    torch::stable::copy_(part, product);
  }
  return y;
}

cuda::PrepareParams prepare_params(const char* op, const Rows& rows, const InputTransform& transform, int64_t k) {
  cuda::PrepareParams params{};
  params.x = rows.x.const_data_ptr();
  params.m = rows.count;
  params.k = k;
  params.x_stride = rows.stride;
  params.dtype = to_dtype(op, "x", rows.x.scalar_type());
  params.transform = transform;
  return params;
}

// The transformed rows, [rows, K].
Tensor transformed(const char* op, const Tensor& x, const InputTransform& transform, int64_t k) {
  const Rows rows = to_rows(op, x, transform.gated ? 2 * k : k);
  cuda::PrepareParams params = prepare_params(op, rows, transform, k);
  Tensor out = torch::stable::new_empty(x, output_sizes(x, k));
  params.out = out.mutable_data_ptr();
  throw_if_error(op, cuda::prepare(params, stream_of(x)));
  return out;
}

// Rows that are not graded: the transformed ones with every stored plane.
Tensor linear_in_full(const char* op, const Tensor& x, const LayerArguments& layer, const InputTransform& transform,
                      const std::optional<Tensor>& residual) {
  const DeviceGuard guard(x.get_device_index());
  const PackedWeight weight = to_tiled(op, layer, x);
  to_grading(op, layer, weight, x);
  check_bias(op, layer.bias, x, weight.n);
  const Dtype dtype = to_dtype(op, "x", x.scalar_type());
  const Rows rows = to_rows(op, x, transform.gated ? 2 * weight.k : weight.k);
  cuda::Gpu gpu;
  bool overlap = false;
  throw_if_error(op, cuda::current_gpu(&gpu, &overlap));
  if (rows.count > cuda::kMostProductRows || !cuda::has_product(weight, dtype) || !cuda::product_runs_on(gpu)) {
    const Tensor y =
        dense_linear(transform.nothing() ? x : transformed(op, x, transform, weight.k), weight, layer.bias);
    if (!residual.has_value()) return y;
    check_residual(op, *residual, y);
    return torch::stable::subtract(y, *residual, -1.0);
  }
  Tensor y = torch::stable::new_empty(x, output_sizes(x, weight.n));
  cuda::ProductParams params{};
  Tensor added;  // keeps it alive
  if (residual.has_value()) {
    check_residual(op, *residual, y);
    added = residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual);
    params.residual = added.const_data_ptr();
  }
  cuda::ProductRoom room{};
  throw_if_error(op, cuda::product_room(&room));
  params.plan = cuda::plan_product(weight.n, weight.k, rows.count, room);
  cuda::PrepareParams prepare = prepare_params(op, rows, transform, weight.k);
  prepare.order = weight.channel_order;
  prepare.tile_rows = params.plan.rows;
  prepare.overlap = overlap;
  Tensor input = torch::stable::new_empty(x, {cuda::product_input_size(rows.count, weight.k, params.plan.rows)});
  prepare.out = input.mutable_data_ptr();
  throw_if_error(op, cuda::prepare(prepare, stream_of(x)));
  params.x = input.const_data_ptr();
  params.m = rows.count;
  params.dtype = dtype;
  params.weight = weight;
  params.bias = layer.bias.has_value() ? layer.bias->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  throw_if_error(op, cuda::product(params, stream_of(x)));
  return y;
}

Tensor linear_cuda(Tensor x, GRINQH_LAYER_PARAMETERS, int64_t max_graded_rows, std::vector<int64_t> sections) {
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  STD_TORCH_CHECK(channel_order.dim() == 1, "grinqh::linear: channel_order has shape ", shape_text(channel_order),
                  ": it must be [K]");
  if (row_count("linear", x, channel_order.size(0)) > max_graded_rows) {
    return linear_in_full("linear", x, layer, {}, std::nullopt);
  }
  Tensor y = empty_output(x, row_scale);
  run_gemv("linear", x, layer, y, nullptr);
  return y;
}

Tensor prepare_cuda(Tensor x, std::optional<Tensor> norm_weight, double norm_eps, bool gated) {
  const DeviceGuard guard(x.get_device_index());
  int64_t k = 0;
  const InputTransform transform = to_transform("prepare", x, norm_weight, norm_eps, gated, &k);
  return transformed("prepare", x, transform, k);
}

Tensor fused_linear_cuda(Tensor x, GRINQH_LAYER_PARAMETERS, int64_t max_graded_rows, std::optional<Tensor> norm_weight,
                         double norm_eps, bool gated, std::optional<Tensor> residual, std::vector<int64_t> sections) {
  Around around;
  int64_t k = 0;
  around.transform = to_transform("fused_linear", x, norm_weight, norm_eps, gated, &k);
  throw_if_error("fused_linear", check_transform(around.transform));
  STD_TORCH_CHECK(row_scale.dim() == 1, "grinqh::fused_linear: row_scale has shape ", shape_text(row_scale),
                  ": it must be [N]");
  const LayerArguments layer = GRINQH_LAYER_ARGUMENTS;
  if (row_count("fused_linear", x, gated ? 2 * k : k) > max_graded_rows) {
    return linear_in_full("fused_linear", x, layer, around.transform, residual);
  }
  if (budget.has_value()) {  // which is fitted to the transformed rows
    const Tensor input = around.transform.nothing() ? x : prepare_cuda(x, norm_weight, norm_eps, gated);
    Tensor y = empty_output(input, row_scale);
    run_gemv("fused_linear", input, layer, y, nullptr);
    if (!residual.has_value()) return y;
    check_residual("fused_linear", *residual, y);
    return torch::stable::subtract(y, *residual, -1.0);
  }
  Tensor y = torch::stable::new_empty(x, output_sizes(x, row_scale.size(0)));
  Tensor added;  // keeps it alive
  if (residual.has_value()) {
    check_residual("fused_linear", *residual, y);
    added = residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual);
    around.residual = added.const_data_ptr();
  }
  run_gemv("fused_linear", x, layer, y, nullptr, around);
  return y;
}

Tensor grade_cuda(Tensor x, std::vector<Tensor> planes, Tensor channel_order, Tensor channel_weight, Tensor thresholds,
                  std::vector<int64_t> widths, std::optional<Tensor> budget, std::vector<int64_t> sections) {
  const DeviceGuard guard(x.get_device_index());
  PackedWeight weight;
  weight.widths = to_widths("grade", widths);
  check_tensor("grade", "channel_order", channel_order, ScalarType::Int, {-1}, x);
  weight.k = channel_order.size(0);
  weight.n = -1;  // any number of tiles
  weight.channel_order = static_cast<const int32_t*>(channel_order.const_data_ptr());
  add_tiled_planes("grade", planes, x, weight);
  weight.n = graded_outputs(sections);
  const Grading grading = to_grading("grade", channel_weight, thresholds, budget, sections, weight, x);
  const Rows rows = to_rows("grade", x, weight.k);
  cuda::GradeParams params = grade_params(rows, to_dtype("grade", "x", x.scalar_type()), weight, grading);
  const cudaStream_t stream = stream_of(x);
  const std::optional<Tensor> factor = fit_budget("grade", params, x, stream);
  Tensor grades = torch::stable::new_empty(x, grade_sizes(x, sections, weight.k), ScalarType::Byte);
  params.grades = static_cast<uint8_t*>(grades.mutable_data_ptr());
  throw_if_error("grade", cuda::grade(params, stream));
  return grades;
}

Tensor dequantize_cuda(std::vector<Tensor> planes, Tensor block_scale, Tensor row_scale, Tensor gain,
                       Tensor channel_order, std::vector<int64_t> widths, int64_t block, int64_t grade,
                       ScalarType dtype) {
  const DeviceGuard guard(row_scale.get_device_index());
  const PackedWeight weight =
      to_tiled("dequantize", {planes, block_scale, row_scale, gain, channel_order, widths, block}, row_scale);
  STD_TORCH_CHECK(grade >= 0 && grade <= weight.widths.count, "grinqh::dequantize: grade is ", grade,
                  ": allowed are 0 to ", weight.widths.count);
  return dense_tiles("dequantize", weight, row_scale, dtype, static_cast<int>(grade), 0, cuda::tile_count(weight.n));
}

}  // namespace
}  // namespace grinqh::binding

STABLE_TORCH_LIBRARY_IMPL(grinqh, CUDA, m) {
  namespace binding = grinqh::binding;
  m.impl("gemv", TORCH_BOX(&binding::gemv_cuda));
  m.impl("gemv.out", TORCH_BOX(&binding::gemv_out_cuda));
  m.impl("gemv_read_bits", TORCH_BOX(&binding::gemv_read_bits_cuda));
  m.impl("linear", TORCH_BOX(&binding::linear_cuda));
  m.impl("prepare", TORCH_BOX(&binding::prepare_cuda));
  m.impl("fused_linear", TORCH_BOX(&binding::fused_linear_cuda));
  m.impl("grade", TORCH_BOX(&binding::grade_cuda));
  m.impl("dequantize", TORCH_BOX(&binding::dequantize_cuda));
}
