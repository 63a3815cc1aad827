#include "kernels.h"
namespace grinqh::cpu {
Kernels avx512_kernels() { return scalar_kernels(); }
}
