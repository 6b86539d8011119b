// Compiles the file TILES once for each instruction set, each in a namespace of its own, and picks the version of its
// KERNEL for the one that a call takes. trie_attention_tile.h says what the macros are that TILES has.

namespace icl {
namespace {

namespace portable {
#define TARGET
#define LANES 4
#define PAIRS 0
#include TILES
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define PAIRS 0
#include TILES
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LANES 16
#define PAIRS 0
#include TILES
#undef TARGET
#undef PAIRS
}  // namespace avx512

namespace avx512bf16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define PAIRS 1
#include TILES
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace avx512bf16
#endif

struct Version {
    decltype(&portable::KERNEL<float>) float32, bfloat16;
    int bfloat16_per_factor;
};

Version version(int isa) {
    switch (choose_isa(isa)) {
#if defined(__x86_64__)
        case kAvx512Bf16:
            return {avx512::KERNEL<float>, avx512bf16::KERNEL<Bf16>, 2};
        case kAvx512:
            return {avx512::KERNEL<float>, avx512::KERNEL<Bf16>, 1};
        case kAvx2:
            return {avx2::KERNEL<float>, avx2::KERNEL<Bf16>, 1};
#endif
        default:
            return {portable::KERNEL<float>, portable::KERNEL<Bf16>, 1};
    }
}

}  // namespace
}  // namespace icl
