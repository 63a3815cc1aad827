// Counters that are zero whenever no kernel runs: kernels that count leave them zero again, so nothing has
// to be cleared before a launch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "grinqh/types.h"
#include "plan.h"

namespace grinqh::cuda {

// `count` zeroed counters on the current device for the next kernel of `stream`. Launches of one stream follow each
// other, so they share; those that are captured into a graph share others, of the capture and the stream, because the
// graph may be replayed beside anything. The memory is never given back: 4 bytes per counter.
Status counters_for(cudaStream_t stream, std::int64_t count, unsigned** counters);

// The current device, as the plan needs it; `overlap` where launches may overlap (sm_90 and later).
Status current_gpu(Gpu* gpu, bool* overlap);

}  // namespace grinqh::cuda
