#include <cstdlib>
#include <string_view>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "../cpu/kernels.h"
#include "grinqh/core.h"

namespace grinqh {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    case Isa::neon: return false;
#elif defined(__aarch64__)
    case Isa::neon: return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    case Isa::avx2:
    case Isa::avx512: return false;
#else
    default: return false;
#endif
  }
  return false;
}

Status current_isa(Isa& isa) {
  constexpr Isa kBestFirst[] = {Isa::avx512, Isa::neon, Isa::avx2, Isa::scalar};
  const char* wanted = std::getenv("GRINQH_CPU_ISA");
  for (Isa candidate : kBestFirst) {
    if (!isa_available(candidate)) continue;
    if (wanted != nullptr && std::string_view(wanted) != isa_name(candidate)) continue;
    isa = candidate;
    return {};
  }
  return error("GRINQH_CPU_ISA is '%.32s': allowed are scalar, avx2, avx512 and neon, as far as this machine runs them",
               wanted);
}

cpu::Kernels cpu::kernels_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_kernels();
    case Isa::avx512: return avx512_kernels();
#elif defined(__aarch64__)
    case Isa::neon: return neon_kernels();
#endif
    default: return scalar_kernels();
  }
}

}  // namespace grinqh
