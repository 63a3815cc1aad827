// torch.ops.grinqh on CUDA tensors that make a packed layer: from weights to canonical planes, and from those to the
// kernels' tile order and back.
#include "convert.h"
#include "cuda_common.h"
#include "kernels.h"
#include "ops_convert.h"

namespace grinqh::binding {
namespace {

Tensor bytes_like(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Byte);
}

Tensor sort_channels_cuda(Tensor weight, std::optional<Tensor> mean_square) {
  const DeviceGuard guard(weight.get_device_index());
  return sort_channels_with(weight, mean_square, [&](const SortParams& params) {
    const Tensor workspace = bytes_like(weight, cuda::sort_workspace_bytes(params.k));
    return cuda::sort_channels(params, workspace.mutable_data_ptr(), stream_of(weight));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_cuda(Tensor weight, Tensor channel_order, int64_t block) {
  const DeviceGuard guard(weight.get_device_index());
  return quantize_with(weight, channel_order, block, [&](const QuantizeParams& params) {
    const Tensor workspace = bytes_like(weight, cuda::quantize_workspace_bytes(params.k));
    return cuda::quantize(params, workspace.mutable_data_ptr(), stream_of(weight));
  });
}

std::vector<Tensor> pack_cuda(Tensor codes, std::vector<int64_t> widths, std::vector<int64_t> channels) {
  const DeviceGuard guard(codes.get_device_index());
  return pack_with(codes, widths, channels,
                   [&](const PackParams& params) { return cuda::pack(params, stream_of(codes)); });
}

// On CUDA, so the dispatcher has seen a plane.
Tensor unpack_cuda(std::vector<Tensor> planes, std::vector<int64_t> widths, int64_t n, int64_t k) {
  const DeviceGuard guard(planes.at(0).get_device_index());
  return unpack_with(planes, widths, n, k,
                     [&](const UnpackParams& params) { return cuda::unpack(params, stream_of(planes[0])); });
}

// Canonical to tile order: what the other CUDA ops take in the places of planes and block_scale.
std::tuple<std::vector<Tensor>, Tensor> repack_cuda(std::vector<Tensor> planes, Tensor block_scale,
                                                    std::vector<int64_t> widths, int64_t n, int64_t block) {
  const DeviceGuard guard(block_scale.get_device_index());
  check_block("repack", block);
  check_tensor("repack", "block_scale", block_scale, ScalarType::Half, {-1, block_count(n, block)}, block_scale);
  PackedWeight weight;
  weight.widths = to_widths("repack", widths);
  weight.n = n;
  weight.k = block_scale.size(0);
  add_planes("repack", planes, block_scale, weight);
  const cudaStream_t stream = stream_of(block_scale);
  std::vector<Tensor> tiled;
  for (int p = 0; p < weight.widths.count; ++p) {
    const int width = weight.widths.width[p];
    tiled.push_back(torch::stable::new_empty(
        block_scale,
        {cuda::sub_count(width), cuda::tile_count(n), weight.channels[p], cuda::run_bytes(cuda::sub_width(width))},
        ScalarType::Byte));
    throw_if_error("repack", cuda::repack_plane(weight.plane[p], n, weight.channels[p], width,
                                                static_cast<uint8_t*>(tiled.back().mutable_data_ptr()), stream));
  }
  Tensor scale = torch::stable::new_empty(
      block_scale, {cuda::tile_count(n) * cuda::blocks_per_tile(static_cast<int>(block)) + 1, weight.k});
  throw_if_error("repack",
                 cuda::repack_scale(static_cast<const uint16_t*>(block_scale.const_data_ptr()), n, weight.k,
                                    static_cast<int>(block), static_cast<uint16_t*>(scale.mutable_data_ptr()), stream));
  throw_if_error("repack", cuda::settle(stream));
  return {tiled, scale};
}

std::tuple<std::vector<Tensor>, Tensor> unpack_tiles_cuda(std::vector<Tensor> planes, Tensor block_scale,
                                                          std::vector<int64_t> widths, int64_t n, int64_t block) {
  const DeviceGuard guard(block_scale.get_device_index());
  check_block("unpack_tiles", block);
  check_tensor("unpack_tiles", "block_scale", block_scale, ScalarType::Half,
               {cuda::tile_count(n) * cuda::blocks_per_tile(static_cast<int>(block)) + 1, -1}, block_scale);
  PackedWeight weight;
  weight.widths = to_widths("unpack_tiles", widths);
  weight.n = n;
  weight.k = block_scale.size(1);
  add_tiled_planes("unpack_tiles", planes, block_scale, weight);
  const cudaStream_t stream = stream_of(block_scale);
  std::vector<Tensor> canonical;
  for (int p = 0; p < weight.widths.count; ++p) {
    const int width = weight.widths.width[p];
    canonical.push_back(
        torch::stable::new_empty(block_scale, {weight.channels[p], plane_row_bytes(n, width)}, ScalarType::Byte));
    throw_if_error("unpack_tiles",
                   cuda::unpack_plane(weight.plane[p], n, weight.channels[p], width,
                                      static_cast<uint8_t*>(canonical.back().mutable_data_ptr()), stream));
  }
  Tensor scale = torch::stable::new_empty(block_scale, {weight.k, block_count(n, block)});
  throw_if_error("unpack_tiles",
                 cuda::unpack_scale(static_cast<const uint16_t*>(block_scale.const_data_ptr()), n, weight.k,
                                    static_cast<int>(block), static_cast<uint16_t*>(scale.mutable_data_ptr()), stream));
  return {canonical, scale};
}

}  // namespace
}  // namespace grinqh::binding

STABLE_TORCH_LIBRARY_IMPL(grinqh, CUDA, m) {
  namespace binding = grinqh::binding;
  m.impl("sort_channels", TORCH_BOX(&binding::sort_channels_cuda));
  m.impl("quantize", TORCH_BOX(&binding::quantize_cuda));
  m.impl("pack", TORCH_BOX(&binding::pack_cuda));
  m.impl("unpack", TORCH_BOX(&binding::unpack_cuda));
  m.impl("repack", TORCH_BOX(&binding::repack_cuda));
  m.impl("unpack_tiles", TORCH_BOX(&binding::unpack_tiles_cuda));
}
