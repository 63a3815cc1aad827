// Barriers in shared memory that count arrivals and copied bytes (mbarrier), and copies that report to them (sm_90).
#pragma once
#include <cstdint>

namespace grinqh::cuda::arrival {

// A barrier's phase ends when all arrivals and bytes are there; then the next begins. `barrier` is its address.
__device__ __forceinline__ void create(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Before the threads' barrier that follows `create`.
__device__ __forceinline__ void created() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until phase number `phase`, counted from 0, has ended; it may be the present one or the one before.
__device__ __forceinline__ void wait(std::uint32_t barrier, int phase) {
  unsigned ended;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(phase & 1)
                 : "memory");
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(phase & 1)
                 : "memory");
#endif
  } while (ended == 0);
}

// Copies to shared memory; addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace grinqh::cuda::arrival
