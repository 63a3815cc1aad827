// Conversion on the GPU: from weights to canonical planes, with the bits that the CPU gives. Device pointers
// throughout. `sort_channels` and `quantize` wait for the GPU, in order to report bad values.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "grinqh/core.h"

namespace grinqh::cuda {

std::int64_t sort_workspace_bytes(std::int64_t k);
Status sort_channels(const SortParams& params, void* workspace, cudaStream_t stream);

std::int64_t quantize_workspace_bytes(std::int64_t k);
Status quantize(const QuantizeParams& params, void* workspace, cudaStream_t stream);

Status pack(const PackParams& params, cudaStream_t stream);
Status unpack(const UnpackParams& params, cudaStream_t stream);

}  // namespace grinqh::cuda
