// Products of a few rows with a weight, compiled once for each instruction set: linear.cpp includes this file inside a
// namespace, with the macros that trie_attention_tile.h explains.
//
// Elements lie along the lanes, of rows and of the weight, as they are stored: nothing is packed. Sums are added up
// over the lanes at the end. So a result's bits depend on its row and its column alone.

typedef float Floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), may_alias));

constexpr int kColumns = LANES == 16 ? 8 : 4;  // of a register block, a power of two; with more, sums would spill
constexpr int kRows = 3;
constexpr int kStep = PAIRS ? 2 * LANES : LANES;  // elements that one instruction multiplies

template <class Vector, class T>
TARGET inline Vector load(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Floats, or pairs of bfloat16.
TARGET inline Floats factors(const float* x) { return load<Floats>(x); }
TARGET inline Floats factors(const Bf16* x) {
#if PAIRS
    return load<Floats>(x);
#else
    return (Floats)(__builtin_convertvector(load<Halves>(x), Ints) << 16);
#endif
}

// kWhole: kStep elements. Otherwise `size` of them, and zeros.
template <bool kWhole, class T>
TARGET inline Floats factors_of(const T* x, int64_t size) {
    if constexpr (kWhole) {
        return factors(x);
    } else {
        T padded[kStep] = {};
        std::memcpy(padded, x, size * sizeof(T));
        return factors(padded);
    }
}

template <class T>
TARGET inline Floats multiply_add(Floats sum, Floats x, Floats y) {
#if PAIRS
    if constexpr (sizeof(T) == 2) return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
    return sum + x * y;
}

// The sums of neighbouring lanes: those of x, then those of y.
TARGET inline Floats fold(Floats x, Floats y) {
#if LANES == 16
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(x, y, 0, 2, 4, 6) + __builtin_shufflevector(x, y, 1, 3, 5, 7);
#endif
}

// The sums over the lanes of each of N vectors, side by side in the first N lanes.
template <int N>
TARGET inline Floats fold_all(Floats* vectors) {
    int lanes = LANES;
    for (int n = N; n > 1; n /= 2, lanes /= 2) {
        for (int i = 0; i < n / 2; ++i) vectors[i] = fold(vectors[2 * i], vectors[2 * i + 1]);
    }
    for (; lanes > 1; lanes /= 2) vectors[0] = fold(vectors[0], vectors[0]);
    return vectors[0];
}

// sums[m][n] += x[m] . w[n], of one step.
template <bool kWhole, int M, int N, class T>
TARGET inline void multiply_step(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t size,
                                 Floats (&sums)[M][N]) {
    Floats rows[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) rows[m] = factors_of<kWhole>(x + m * x_stride, size);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        Floats column = factors_of<kWhole>(w + n * w_stride, size);
#if defined(__x86_64__)
        asm("" : "+v"(column));  // loaded once: gcc 12 would load it for each product
#endif
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][n] = multiply_add<T>(sums[m][n], rows[m], column);
    }
}

// out[m][n] = (first ? 0 : out[m][n]) + x[m] . w[n], for M rows and N columns. Asks for `ahead` meanwhile.
template <int M, int N, class T>
TARGET void multiply_block(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t size, bool first,
                           const T* ahead, float* out, int64_t out_stride) {
    Floats sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[m][n] = Floats{};
    }
    for (; size >= kStep; size -= kStep, x += kStep, w += kStep, ahead += kStep) {
        __builtin_prefetch(ahead, 0, 2);
        multiply_step<true, M, N>(x, x_stride, w, w_stride, kStep, sums);
    }
    if (size) multiply_step<false, M, N>(x, x_stride, w, w_stride, size, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m, out += out_stride) {
        const Floats totals = fold_all<N>(sums[m]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) out[n] = (first ? 0.0f : out[n]) + totals[n];
    }
}

// While the first rows are multiplied, the next `num_next` columns come from memory: without that, it and the products
// would wait for each other.
template <int M, int N, class T>
TARGET void multiply_rows(const T* x, int64_t rows, int64_t x_stride, const T* w, int64_t w_stride, int64_t size,
                          bool first, const T* next, int num_next, float* out, int64_t out_stride) {
    for (; rows >= M; rows -= M, x += M * x_stride, out += M * out_stride) {
        multiply_block<M, N>(x, x_stride, w, w_stride, size, first, num_next ? next : w, out, out_stride);
        if (num_next) --num_next, next += w_stride;
    }
    if constexpr (M > 1) {
        multiply_rows<M - 1, N>(x, rows, x_stride, w, w_stride, size, first, next, num_next, out, out_stride);
    }
}

// All rows with some columns of the weight; `sums` is [R][columns].
template <class T>
TARGET void multiply(const Linear& a, int64_t column, int64_t columns, float* sums) {
    const T* weight = static_cast<const T*>(a.weight) + column * a.weight_stride;
    int64_t k = 0;
    do {
        const int64_t size = std::min(kDepth, a.E - k);
        const T *x = static_cast<const T*>(a.x) + k, *w = weight + k;
        int64_t c = 0;
        for (; c + kColumns <= columns; c += kColumns, w += kColumns * a.weight_stride) {
            const int num_next = c + 2 * kColumns <= columns ? kColumns : 0;
            multiply_rows<kRows, kColumns>(x, a.R, a.x_stride, w, a.weight_stride, size, k == 0,
                                           w + num_next * a.weight_stride, num_next, sums + c, columns);
        }
        for (; c < columns; ++c, w += a.weight_stride) {
            multiply_rows<kRows, 1>(x, a.R, a.x_stride, w, a.weight_stride, size, k == 0, w, 0, sums + c, columns);
        }
        k += size;
    } while (k < a.E);
    for (int64_t r = 0; r < a.R; ++r) {
        T* out = static_cast<T*>(a.out) + r * a.O + column;
        for (int64_t c = 0; c < columns; ++c) {
            const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[column + c]) : 0.0f;
            out[c] = nearest<T>(sums[r * columns + c] + bias);
        }
    }
}
