// Matrix products of a warpgroup (four warps) from shared memory, as sm_90a has them: what product.cu needs of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace grinqh::cuda::wgmma {

// Where an operand lies: rows of 128 bytes in groups of eight, whose 16-byte chunks are exchanged by chunk_of.
__device__ __forceinline__ std::uint64_t operand(std::uint32_t shared_address) {
  constexpr std::uint64_t kGroupBytes = 1024, kChunksExchanged = 1;
  return shared_address >> 4 | std::uint64_t{1} << 16 | kGroupBytes >> 4 << 32 | kChunksExchanged << 62;
}
__device__ __forceinline__ int chunk_of(int row, int chunk) { return chunk ^ row % 8; }

// Registers of an accumulator stay where they are from the first product to the last wait.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// What was written to shared memory becomes visible to the products.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All warps of a warpgroup change the number of registers that each of their threads has.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#define GRINQH_8(d, i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define GRINQH_WGMMA_64(type)                                                                                    \
  asm volatile(                                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
      "%28,%29,%30,%31}, %32, %33, p, 1, 1, 1, 0;\n}"                                                            \
      : GRINQH_8(sum, 0), GRINQH_8(sum, 8), GRINQH_8(sum, 16), GRINQH_8(sum, 24)                                 \
      : "l"(a), "l"(b), "r"(add))
#define GRINQH_WGMMA_128(type)                                                                                   \
  asm volatile(                                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                               \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                               \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
      "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
      "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 1, 0;\n}"                                    \
      : GRINQH_8(sum, 0), GRINQH_8(sum, 8), GRINQH_8(sum, 16), GRINQH_8(sum, 24), GRINQH_8(sum, 32),             \
        GRINQH_8(sum, 40), GRINQH_8(sum, 48), GRINQH_8(sum, 56)                                                  \
      : "l"(a), "l"(b), "r"(add))

// sum[64 x columns] = a[64 x 16] * b[16 x columns], plus sum where `add` is not 0. a lies with its 64 rows side by
// side, b with its 16. Lane l of warp w holds the rows 16 w + l / 4 + 8 (i / 2 % 2) and the columns
// 8 (i / 4) + 2 (l % 4) + i % 2 in sum[i].
__device__ __forceinline__ void add_product(float (&sum)[32], std::uint64_t a, std::uint64_t b, int add, __half) {
  GRINQH_WGMMA_64("f16");
}
__device__ __forceinline__ void add_product(float (&sum)[32], std::uint64_t a, std::uint64_t b, int add,
                                            __nv_bfloat16) {
  GRINQH_WGMMA_64("bf16");
}
__device__ __forceinline__ void add_product(float (&sum)[64], std::uint64_t a, std::uint64_t b, int add, __half) {
  GRINQH_WGMMA_128("f16");
}
__device__ __forceinline__ void add_product(float (&sum)[64], std::uint64_t a, std::uint64_t b, int add,
                                            __nv_bfloat16) {
  GRINQH_WGMMA_128("bf16");
}
#undef GRINQH_8
#undef GRINQH_WGMMA_64
#undef GRINQH_WGMMA_128

}  // namespace grinqh::cuda::wgmma
