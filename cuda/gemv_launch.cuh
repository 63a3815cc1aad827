// From a GEMV's arguments to the kernel instance that takes its rows, planes and blocks (gemv_kernel.cuh).
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>

#include "gemv_kernel.cuh"

namespace grinqh::cuda::detail {

// Whether the plan allows for what an instance keeps in shared memory, beside 1 KB for its own variables.
template <int kRows, int kBlocks, int kWarps, int kStages, int kSplit>
constexpr bool plan_allows_for_it() {
  for (int k_warps = kSplit; k_warps <= kWarps; k_warps *= 2) {
    for (int turns = 1; turns <= 2; ++turns) {
      const int sums = kWarps / k_warps * sum_buffers(turns);
      const int kept = Shared<kRows, kBlocks, kWarps / kSplit, kStages>::total(sums, kSlab * kMaxSubplanes);
      const int planned = plan_detail::shared_bytes({kRows, kWarps, kStages, kSplit}, kTile / kBlocks, k_warps, turns,
                                                    kMaxSubplanes, 1);
      if (kept + 1024 > planned) return false;
    }
  }
  return true;
}

template <bool kAround, int kRows, int kBlocks, bool kOneBit, int kWarps, int kStages, int kSplit>
Status launch(const GemvArgs& a, cudaStream_t stream) {
  static_assert(plan_allows_for_it<kRows, kBlocks, kWarps, kStages, kSplit>());
  const auto kernel = gemv_kernel<kAround, kRows, kBlocks, kOneBit, kWarps, kStages, kSplit>;
  const int bytes =
      Shared<kRows, kBlocks, kWarps / kSplit, kStages>::total((kWarps >> a.k_warp_bits) * a.sum_buffers, a.capacity);
  static std::atomic<std::uint64_t> prepared[4];  // a bit for each device
  int device = 0;
  cudaError_t failure = cudaGetDevice(&device);
  const std::uint64_t bit = std::uint64_t{1} << (device % 64);
  if (failure == cudaSuccess && !(prepared[device / 64 % 4] & bit)) {
    // A block may use more than 48 KB of shared memory only after this.
    int most = 0;
    failure = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncAttributes attributes{};
    if (failure == cudaSuccess) failure = cudaFuncGetAttributes(&attributes, kernel);
    if (failure == cudaSuccess)
      failure = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - static_cast<int>(attributes.sharedSizeBytes));
    if (failure == cudaSuccess) prepared[device / 64 % 4] |= bit;
  }
  if (failure == cudaSuccess) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(a.slices, a.columns, (a.m + kRows - 1) / kRows);
    config.blockDim = dim3(kWarps * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = a.overlap;
    failure = cudaLaunchKernelEx(&config, kernel, a);
  }
  if (failure != cudaSuccess) return error("grinqh gemv: %s", cudaGetErrorString(failure));
  return {};
}

template <bool kAround, int kRows, int kBlocks, bool kOneBit, bool kLarge>
Status launch_instance(const GemvArgs& a, cudaStream_t stream) {
  constexpr GemvInstance instance = gemv_instance(kRows, kOneBit, kLarge);
  return launch<kAround, kRows, kBlocks, kOneBit, instance.warps, instance.stages, instance.split>(a, stream);
}

template <bool kAround, int kRows, int kBlocks, bool kOneBit>
Status launch_rows(const GemvArgs& a, bool large, cudaStream_t stream) {
  return large ? launch_instance<kAround, kRows, kBlocks, kOneBit, true>(a, stream)
               : launch_instance<kAround, kRows, kBlocks, kOneBit, false>(a, stream);
}

// The instances: rows of x at once, blocks per tile, whether a plane has 1 bit.
template <bool kAround, int kBlocks, bool kOneBit>
Status launch_planes(const GemvArgs& a, bool large, cudaStream_t stream) {
  switch (gemv_instance(a.m, kOneBit, large).rows) {
    case 1: return launch_rows<kAround, 1, kBlocks, kOneBit>(a, large, stream);
    case 2: return launch_rows<kAround, 2, kBlocks, kOneBit>(a, large, stream);
    case 4: return launch_rows<kAround, 4, kBlocks, kOneBit>(a, large, stream);
    default: return launch_instance<kAround, 8, kBlocks, kOneBit, true>(a, stream);
  }
}

template <bool kAround, int kBlocks>
Status launch_blocks(const GemvArgs& a, bool large, cudaStream_t stream) {
  return a.one_bit ? launch_planes<kAround, kBlocks, true>(a, large, stream)
                   : launch_planes<kAround, kBlocks, false>(a, large, stream);
}

template <bool kAround>
Status launch_gemv(const GemvArgs& a, std::int64_t block, bool large, cudaStream_t stream) {
  switch (block) {
    case 32: return launch_blocks<kAround, 8>(a, large, stream);
    case 64: return launch_blocks<kAround, 4>(a, large, stream);
    case 128: return launch_blocks<kAround, 2>(a, large, stream);
    default: return error("grinqh gemv: block is %lld; 32, 64 and 128 are supported", static_cast<long long>(block));
  }
}

// gemv_around.cu compiles these: the instances are most of the backend's compile time.
extern template Status launch_gemv<true>(const GemvArgs& a, std::int64_t block, bool large, cudaStream_t stream);

}  // namespace grinqh::cuda::detail
