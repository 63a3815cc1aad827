// The ops that make a packed layer, for any backend: what is checked and allocated. `run` does the work, from the
// core's parameters to a Status.
#pragma once
#include <algorithm>
#include <tuple>

#include "core/validate.h"
#include "ops_common.h"

namespace grinqh::binding {

template <typename Run>
Tensor sort_channels_with(const Tensor& weight, const std::optional<Tensor>& mean_square, const Run& run) {
  check_tensor("sort_channels", "weight", weight, ScalarType::Float, {-1, -1}, weight);
  SortParams params{};
  params.n = weight.size(0);
  params.k = weight.size(1);
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  if (mean_square.has_value()) {
    check_tensor("sort_channels", "mean_square", *mean_square, ScalarType::Float, {params.k}, weight);
    params.mean_square = static_cast<const float*>(mean_square->const_data_ptr());
  }
  Tensor order = torch::stable::new_empty(weight, {params.k}, ScalarType::Int);
  params.channel_order = static_cast<int32_t*>(order.mutable_data_ptr());
  throw_if_error("sort_channels", run(params));
  return order;
}

template <typename Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_with(const Tensor& weight, const Tensor& channel_order,
                                                                 int64_t block, const Run& run) {
  check_tensor("quantize", "weight", weight, ScalarType::Float, {-1, -1}, weight);
  QuantizeParams params{};
  params.n = weight.size(0);
  params.k = weight.size(1);
  params.block = block;
  check_tensor("quantize", "channel_order", channel_order, ScalarType::Int, {params.k}, weight);
  STD_TORCH_CHECK(is_block(block), "grinqh::quantize: block is ", block, ": allowed are 32, 64 and 128");
  Tensor codes = torch::stable::new_empty(weight, {params.k, params.n}, ScalarType::Byte);
  Tensor block_scale = torch::stable::new_empty(weight, {params.k, block_count(params.n, block)}, ScalarType::Half);
  Tensor row_scale = torch::stable::new_empty(weight, {params.n});
  Tensor gain = torch::stable::new_empty(weight, {kCodeBits + 1});
  Tensor channel_error = torch::stable::new_empty(weight, {kCodeBits + 1, params.k});
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  params.channel_order = static_cast<const int32_t*>(channel_order.const_data_ptr());
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.block_scale = static_cast<uint16_t*>(block_scale.mutable_data_ptr());
  params.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  params.gain = static_cast<float*>(gain.mutable_data_ptr());
  params.channel_error = static_cast<float*>(channel_error.mutable_data_ptr());
  throw_if_error("quantize", run(params));
  return {codes, block_scale, row_scale, gain, channel_error};
}

template <typename Run>
std::vector<Tensor> pack_with(const Tensor& codes, const std::vector<int64_t>& widths,
                              const std::vector<int64_t>& channels, const Run& run) {
  check_tensor("pack", "codes", codes, ScalarType::Byte, {-1, -1}, codes);
  PackParams params{};
  params.k = codes.size(0);
  params.n = codes.size(1);
  params.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  params.widths = to_widths("pack", widths);
  STD_TORCH_CHECK(channels.size() == widths.size(), "grinqh::pack: channels has ", channels.size(),
                  " entries and widths ", widths.size(), ": they must be as many");
  std::copy(channels.begin(), channels.end(), params.channels);
  throw_if_error("pack", check_channels(params.widths, params.channels, params.k));
  std::vector<Tensor> planes;
  for (int p = 0; p < params.widths.count; ++p) {
    planes.push_back(torch::stable::new_empty(
        codes, {params.channels[p], plane_row_bytes(params.n, params.widths.width[p])}, ScalarType::Byte));
    params.plane[p] = static_cast<uint8_t*>(planes.back().mutable_data_ptr());
  }
  throw_if_error("pack", run(params));
  return planes;
}

template <typename Run>
Tensor unpack_with(const std::vector<Tensor>& planes, const std::vector<int64_t>& widths, int64_t n, int64_t k,
                   const Run& run) {
  STD_TORCH_CHECK(!planes.empty(), "grinqh::unpack: planes is empty: it must hold one tensor for each plane");
  PackedWeight weight;
  weight.n = n;
  weight.k = k;
  weight.widths = to_widths("unpack", widths);
  throw_if_error("unpack", check_shape(n, k));
  add_planes("unpack", planes, planes[0], weight);
  Tensor codes = torch::stable::new_empty(planes[0], {k, n});
  UnpackParams params{};
  params.n = n;
  params.k = k;
  params.widths = weight.widths;
  std::copy(weight.channels, weight.channels + kMaxPlanes, params.channels);
  std::copy(weight.plane, weight.plane + kMaxPlanes, params.plane);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  throw_if_error("unpack", run(params));
  return codes;
}

}  // namespace grinqh::binding
