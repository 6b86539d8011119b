// What native code of several files stands on: bfloat16, memory, threads.
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "icl.h"

namespace icl {
namespace {

struct Bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// The nearest float, or bfloat16, the upper half of a float: of two as near the even one; nan stays nan.
template <class T>
inline T nearest(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint32_t rounded = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
        return T{static_cast<uint16_t>(rounded >> 16)};
    }
}

inline int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline int64_t max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

inline int64_t thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// Uninitialised memory, aligned to a cache line.
inline std::unique_ptr<char[], Free> allocate(int64_t bytes) {
    return std::unique_ptr<char[], Free>(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
}

}  // namespace
}  // namespace icl
