// What target_logprob and its backward share: the tiles of each instruction set, their products, and how they are
// packed.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace icl {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kMaxThreads = 32;
constexpr int kColumns = 8;            // most columns at a time: weights 2^n apart contend for a few cache lines
constexpr int64_t kBlockColumns = 96;  // logits of a row in a tile
constexpr int64_t kDepth = 2048;       // of a row and a column, multiplied at a time
constexpr float kLeastLogp = -80;      // of what has a gradient: products of smaller ones would be subnormal and slow
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline float to_float(uint16_t x) { return to_float(Bf16{x}); }

template <class To, class From>
inline To convert(From x) {
    if constexpr (std::is_same_v<To, From>) {
        return x;
    } else {
        return to_float(x);
    }
}

#define ICL_INLINE inline __attribute__((always_inline))

#define ICL_ISA Portable
#define ICL_TARGET
#define ICL_LANES 4
#define ICL_SUMS 8
#define ICL_VECTORS 2
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#if defined(__x86_64__)
#define ICL_ISA Avx2
#define ICL_TARGET __attribute__((target("avx2,fma")))
#define ICL_LANES 8
#define ICL_SUMS 12
#define ICL_VECTORS 2
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#define ICL_ISA Avx512
#define ICL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define ICL_LANES 16
#define ICL_SUMS 24
#define ICL_VECTORS 4
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#define ICL_ISA Avx512Bf16
#define ICL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define ICL_LANES 16
#define ICL_SUMS 24
#define ICL_VECTORS 4
#define ICL_PAIRS 1
#include "target_logprob_isa.h"
#endif

// Deals out the workspace; only counts, if it has none.
struct Arena {
    char* memory;
    int64_t used = 0;

    template <class T>
    T* take(int64_t size) {
        char* start = memory == nullptr ? nullptr : memory + used;
        used += round_up(size * static_cast<int64_t>(sizeof(T)), kCacheLine);
        return reinterpret_cast<T*>(start);
    }
};

// The product of as many columns as fill the registers with so many vectors of rows, how many those are, and the
// product of one column.
template <class K, bool Across, int N = 1>
auto products_of(int vectors) {
    if constexpr (N < K::kVectors) {
        if (vectors > N) return products_of<K, Across, N + 1>(vectors);
    }
    constexpr int C = std::min(kColumns, K::kSums / N);
    return std::tuple(&K::template products<Across, C, N>, C, &K::template products<Across, 1, N>);
}

// tile[c][r] = (first ? 0 : tile[c][r]) + sum over k of weight(c, k) * rows[k][r], for a panel's vectors of rows; K
// says where weight(c, k) is.
template <class K, bool Across = false>
void multiply(const typename K::Element* weight, int64_t stride, int64_t columns, const typename K::Element* rows,
              int vectors, int64_t num_units, bool first, float* tile) {
    const auto [products, at_a_time, product] = products_of<K, Across>(vectors);
    for (int64_t c = 0; c < columns;) {
        const bool whole = columns - c >= at_a_time;
        (whole ? products : product)(weight + c * (Across ? K::kUnit : stride), stride, rows, num_units, first,
                                     tile + c * vectors * K::kLanes);
        c += whole ? at_a_time : 1;
    }
}

// One of `lanes` lanes of a panel, whose k is followed by zeros: to[k / kUnit][lane][k % kUnit], given to[0][lane].
template <class K, class Source>
void pack_lane(const Source* from, int64_t stride, int64_t size, int64_t depth, int64_t lanes,
               typename K::Element* to) {
    for (int64_t k = 0; k < depth; ++k) {
        to[k / K::kUnit * lanes * K::kUnit + k % K::kUnit] =
            k < size ? convert<typename K::Element>(from[k * stride]) : 0;
    }
}

// What `call` returns for the kernels of the instruction set that a call takes, and for the type of its elements.
template <class Call>
auto choose_kernel(const TargetLogprob& args, Call call) {
    const auto in_floats = [&](auto kernel) {
        return args.bfloat16 ? call(kernel, uint16_t{}) : call(kernel, float{});
    };
    switch (choose_isa(args.isa)) {
#if defined(__x86_64__)
        case kAvx512Bf16:
            return args.bfloat16 ? call(Avx512Bf16{}, uint16_t{}) : call(Avx512{}, float{});
        case kAvx512:
            return in_floats(Avx512{});
        case kAvx2:
            return in_floats(Avx2{});
#endif
        default:
            return in_floats(Portable{});
    }
}

inline void require_sizes(const TargetLogprob& args) {
    require_range("rows of hidden", args.R, 0);
    require_range("columns of hidden", args.E, 0);
    require_range("rows of weight", args.V, 1);
    require_range("targets", args.M, 0);
}

// Runs a call whose workspace and result are those of size(null) and size(workspace).
template <class Size>
void run_in_workspace(Size size) {
    const std::unique_ptr<char, decltype(&std::free)> workspace(
        static_cast<char*>(std::aligned_alloc(kCacheLine, static_cast<size_t>(size(nullptr)))), &std::free);
    if (workspace == nullptr) throw std::bad_alloc();
    size(workspace.get());
}

}  // namespace
}  // namespace icl
