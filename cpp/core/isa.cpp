#include <cstdlib>
#include <string_view>

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
    case Isa::neon: return true;
    case Isa::avx2:
    case Isa::avx512: return false;
#else
    default: return false;
#endif
  }
  return false;
}

Isa current_isa() {
  static const Isa chosen = [] {
    constexpr Isa kBestFirst[] = {Isa::avx512, Isa::neon, Isa::avx2, Isa::scalar};
    if (const char* wanted = std::getenv("GRINQH_CPU_ISA"); wanted != nullptr) {
      for (Isa isa : kBestFirst) {
        if (std::string_view(wanted) == isa_name(isa) && isa_available(isa)) return isa;
      }
    }
    for (Isa isa : kBestFirst) {
      if (isa_available(isa)) return isa;
    }
    return Isa::scalar;
  }();
  return chosen;
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
