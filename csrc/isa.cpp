// Which instruction sets this processor has.
#include "icl.h"

namespace icl {

int best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

int choose_isa(int isa) {
    const int best = best_isa();
    require_range("isa", isa, kBestIsa, best);
    return isa == kBestIsa ? best : isa;
}

}  // namespace icl
