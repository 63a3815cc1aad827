// What the CUDA ops share: the current stream, and planes in tile order.
#pragma once
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "layout.h"
#include "ops_common.h"

// Defined by libtorch_cuda.so and absent from a CPU-only torch. A weak reference is null there, which lets
// one library load beside either.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace grinqh::binding {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t stream_of(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "grinqh: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Channels of a plane in tile order, uint8 [subplanes, tiles, K_p, run].
inline void add_tiled_planes(const char* op, const std::vector<Tensor>& planes, const Tensor& like,
                             PackedWeight& weight) {
  STD_TORCH_CHECK(static_cast<int>(planes.size()) == weight.widths.count, "grinqh::", op, ": planes has ",
                  planes.size(), " tensors and widths ", weight.widths.count, " entries: they must be as many");
  int64_t most = weight.k;
  for (size_t p = 0; p < planes.size(); ++p) {
    const std::string name = "planes[" + std::to_string(p) + "]";
    const int width = weight.widths.width[p];
    STD_TORCH_CHECK(planes[p].dim() == 4, "grinqh::", op, ": ", name, " has shape ", shape_text(planes[p]),
                    ": CUDA ops take planes in tile order, [subplanes, tiles, K_p, run], as grinqh::repack makes them");
    check_tensor(op, name, planes[p], ScalarType::Byte,
                 {cuda::sub_count(width), weight.n < 0 ? -1 : cuda::tile_count(weight.n), -1,
                  cuda::run_bytes(cuda::sub_width(width))},
                 like);
    STD_TORCH_CHECK(planes[p].size(2) <= most, "grinqh::", op, ": ", name, " stores ", planes[p].size(2),
                    " channels: allowed are at most ", most);
    most = weight.channels[p] = planes[p].size(2);
    weight.plane[p] = static_cast<const uint8_t*>(planes[p].const_data_ptr());
  }
}

inline void check_block(const char* op, int64_t block) {
  STD_TORCH_CHECK(is_block(block), "grinqh::", op, ": block is ", block, ": allowed are 32, 64 and 128");
}

}  // namespace grinqh::binding
