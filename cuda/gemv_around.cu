// The GEMV's kernels with a transform of x or a residual.
#include "gemv_launch.cuh"

namespace grinqh::cuda::detail {

template Status launch_gemv<true>(const GemvArgs& a, std::int64_t block, bool large, cudaStream_t stream);

}  // namespace grinqh::cuda::detail
