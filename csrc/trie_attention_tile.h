// Attention of a few tiles of queries, compiled once for each instruction set: trie_attention.cpp includes this file
// inside a namespace, with these macros:
//   TARGET  the functions' target attribute
//   LANES   floats in a vector
//   PAIRS   1 where a product's factors are pairs of bfloat16 that one instruction multiplies and sums, 0 for floats
//
// Queries lie along the lanes: both products then read their other factor as broadcasts from rows as they are stored,
// and the softmax over keys never crosses lanes. So a query's bits depend on no other query.

typedef float Floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Factor __attribute__((may_alias));  // a float or a pair of bfloat16

constexpr int kVectors = kQueries / LANES;  // vectors to a row of a tile
constexpr int kWide = LANES == 16 ? 4 : 2;  // vectors and broadcasts of a register block; with more, sums would spill
constexpr int kTall = 6;
constexpr int kPerFactor = 1 + PAIRS;
constexpr int kFew = 8;  // queries for which a tile of keys takes less time with keys along the lanes

template <class Vector, class T>
TARGET inline Vector load(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

TARGET inline Floats splat(float x) { return x - Floats{}; }

#if LANES == 16
// Masks of all lanes: gcc 12 takes what the unmasked intrinsics start from for an uninitialised variable.
TARGET inline Floats maximum(Floats x, Floats y) { return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y); }
#else
TARGET inline Floats maximum(Floats x, Floats y) { return x > y ? x : y; }
#endif

// 2**x to a relative error of 1.3e-7, exactly 1 at 0, 0 below -127.
TARGET inline Floats exp2(Floats x) {
#if LANES == 16
    const Floats fraction = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
    const Floats whole = x - fraction;
#else
    constexpr float kShift = 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to an integer
    x = maximum(x, splat(-127.0f));
    const Floats shifted = x + kShift, whole = shifted - kShift, fraction = x - whole;
#endif
    Floats y = splat(0.001326472731307149f);
    y = y * fraction + 0.009671512991189957f;
    y = y * fraction + 0.05550733581185341f;
    y = y * fraction + 0.24022242426872253f;
    y = y * fraction + 0.6931470036506653f;
    y = y * fraction + 1.0f;
#if LANES == 16
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)whole);
#else
    return (Floats)((Ints)y + ((Ints)shifted << 23));
#endif
}

TARGET inline Floats tanh(Floats x) {
    const Floats square = x * x, magnitude = (Floats)((Ints)x & 0x7fffffff);
    Floats y = splat(-5.70498872745e-3f);  // below 0.625, where 1 - t would cancel
    y = y * square + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    y = y * square * x + x;
    const Floats t = exp2(magnitude * (-2 * kLog2E)), large = 1.0f - 2.0f * t / (1.0f + t);
    const Floats sign = (Floats)((Ints)x & INT32_MIN);
    return magnitude < 0.625f ? y : (Floats)((Ints)large | (Ints)sign);
}

template <bool kPairs>
TARGET inline Floats multiply_add(Floats sum, Ints x, Ints y) {
#if PAIRS
    if constexpr (kPairs) return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
    return sum + (Floats)x * (Floats)y;
}

// A register block of out = factor * out + x @ y, where x[n][step] is x[n * row + step * stride] and y[step] is
// y[step * y_row]; no factor means 0.
// The product is summed by itself: one chain of additions over thousands of keys would lose four times the precision.
// kGoOn: of out += x @ y instead, added to out itself step by step, of floats whatever PAIRS is.
template <bool kGoOn, int N, int M>
TARGET void multiply_block(const Factor* x, int64_t row, int64_t stride, const Ints* y, int64_t y_row, int64_t steps,
                           const Floats* factor, Floats* out) {
    constexpr bool kInPairs = PAIRS && !kGoOn;
    Floats sums[N][M];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[n][m] = kGoOn ? out[n * kVectors + m] : Floats{};
    }
    for (int64_t step = 0; step < steps; ++step, x += stride, y += y_row) {
        Ints values[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) values[m] = y[m];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const Ints broadcast = x[n * row] - Ints{};
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[n][m] = multiply_add<kInPairs>(sums[n][m], broadcast, values[m]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            Floats& sum = out[n * kVectors + m];
            sum = factor ? factor[m] * sum + sums[n][m] : sums[n][m];
        }
    }
}

template <bool kGoOn, int N, int M>
TARGET void multiply_rows(const Factor* x, int64_t rows, int64_t row, int64_t stride, const Ints* y, int64_t y_row,
                          int64_t steps, const Floats* factor, Floats* out) {
    for (; rows >= N; rows -= N, x += N * row, out += N * kVectors) {
        multiply_block<kGoOn, N, M>(x, row, stride, y, y_row, steps, factor, out);
    }
    if constexpr (N > 1)
        multiply_rows<kGoOn, (N > 4 ? 4 : N - 1), M>(x, rows, row, stride, y, y_row, steps, factor, out);
}

template <bool kGoOn, int M = kWide>
TARGET void multiply(const Factor* x, int64_t rows, int64_t row, int64_t stride, const Ints* y, int64_t steps,
                     const Floats* factor, Floats* out, int vectors, int64_t y_row = kVectors) {
    for (; vectors >= M; vectors -= M, y += M, out += M, factor += factor ? M : 0) {
        multiply_rows<kGoOn, kTall, M>(x, rows, row, stride, y, y_row, steps, factor, out);
    }
    if constexpr (M > 1) multiply<kGoOn, M - 1>(x, rows, row, stride, y, steps, factor, out, vectors, y_row);
}

// A tile of queries and what is known of their softmax so far; lanes beyond `count` see nothing.
struct Tile {
    int64_t first;  // of the T * (H / G) queries of a key/value head, a query's heads side by side
    int count, vectors;
    Range rows, depths;
    Range vector_rows[kVectors], vector_depths[kVectors];
    alignas(64) int32_t row[kQueries];
    alignas(64) int32_t depth[kQueries];
    alignas(64) float top[kQueries];    // the greatest product so far; of an invariant call, what weights refer to
    alignas(64) float total[kQueries];  // the sum of exp((product - top) * unit)
    Factor* q;                          // [factors of a query][kQueries]
    Floats* out;                        // [Dv][kVectors], not yet divided by total
    // Of an invariant call: what its group of keys, not yet ended, adds to total and out.
    alignas(64) float open_total[kQueries];
    Floats* open;
};

// The vectors [first, end) of a tile of queries that see some key of a tile of keys, or lie between two that do.
struct Seeing {
    int first, end;
    bool masked;  // whether one of them does not see all keys
};

// Of rows that each have keys of their own, as decoding has them, one vector sees a tile of keys, and the others are
// spared its products.
TARGET inline Seeing seeing(const Problem& problem, const KeyTile& keys, const Tile& tile) {
    Seeing some{tile.vectors, 0, false};
    bool masked = false;
    for (int m = 0; m < tile.vectors; ++m) {
        const View view = see(problem, keys, tile.vector_rows[m], tile.vector_depths[m]);
        masked |= view != View::kAll;
        if (view == View::kNone) continue;
        if (some.end == 0) {
            some.first = m;
            masked = view != View::kAll;
        }
        some.end = m + 1;
        some.masked = masked;
    }
    return some;
}

// out[i * out_stride] becomes the factor of low[i * stride] and, in a pair, high[i * stride].
template <bool kPairs, class T>
TARGET inline void pack(const T* low, [[maybe_unused]] const T* high, int64_t stride, int64_t size, Factor* out,
                        int64_t out_stride) {
    for (int64_t i = 0; i < size; ++i) {
        if constexpr (kPairs) {
            out[i * out_stride] = low[i * stride].bits | static_cast<uint32_t>(high[i * stride].bits) << 16;
        } else {
            const float x = to_float(low[i * stride]);
            std::memcpy(&out[i * out_stride], &x, sizeof x);
        }
    }
}

// The components of one query or key as factors.
template <class T>
TARGET inline void pack_vector(const T* x, int64_t stride, int64_t size, Factor* out, int64_t out_stride) {
#if PAIRS
    if (stride == 1 && out_stride == 1) {
        std::memcpy(out, x, size / 2 * sizeof(Factor));
    } else {
        pack<true>(x, x + stride, 2 * stride, size / 2, out, out_stride);
    }
    if (size % 2) out[size / 2 * out_stride] = x[(size - 1) * stride].bits;
#else
    if (stride == 1 && out_stride == 1) {
        pack<false>(x, x, 1, size, out, 1);
    } else {
        pack<false>(x, x, stride, size, out, out_stride);
    }
#endif
}

template <class T>
TARGET void load_tile(const Problem& problem, int64_t g, int64_t first, Tile& tile) {
    const int64_t heads = problem.H / problem.G;
    tile.first = first;
    tile.count = static_cast<int>(std::min<int64_t>(kQueries, problem.T * heads - first));
    tile.vectors = (tile.count + LANES - 1) / LANES;
    tile.rows = tile.depths = {};
    std::fill_n(tile.vector_rows, kVectors, Range{});
    std::fill_n(tile.vector_depths, kVectors, Range{});
    std::memset(tile.q, 0, sizeof(Factor) * problem.factors * kQueries);
    for (int n = 0; n < kQueries; ++n) {
        tile.row[n] = -1;
        tile.depth[n] = 0;
        tile.top[n] = kLowest;
        tile.total[n] = 0;
        if (n >= tile.count) continue;
        const int64_t t = (first + n) / heads, h = g * heads + (first + n) % heads;
        tile.vector_rows[n / LANES].include(tile.row[n] = problem.row_q[t]);
        tile.vector_depths[n / LANES].include(tile.depth[n] = problem.depth_q[t]);
        tile.rows.include(tile.row[n]);
        tile.depths.include(tile.depth[n]);
        if (problem.sinks && problem.sinks[h] > -INFINITY) {
            tile.top[n] = problem.sinks[h] / problem.unit;
            tile.total[n] = 1;
        }
        const T* q = static_cast<const T*>(problem.q) + t * problem.q_strides[0] + h * problem.q_strides[1];
        pack_vector(q, problem.q_strides[2], problem.D, tile.q + n, kQueries);
    }
    if (problem.scale < 0) {
        for (int64_t i = 0; i < problem.factors * kQueries; ++i) tile.q[i] ^= PAIRS ? 0x80008000 : 0x80000000;
    }
    std::fill_n(tile.out, problem.Dv * kVectors, Floats{});
    if (problem.batch_invariant) {
        std::fill_n(tile.open_total, kQueries, 0.0f);
        std::fill_n(tile.open, problem.Dv * kVectors, Floats{});
    }
}

// Asks for the same row of the next tile of keys: rows lie too far apart for the processor to foresee it.
template <class T>
TARGET inline void fetch_next(const T* row, int64_t stride, int64_t size) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const uintptr_t next =
        reinterpret_cast<uintptr_t>(row) + kKeys * stride * sizeof(T);  // perhaps behind the last row
    for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(reinterpret_cast<const void*>(next + i * sizeof(T)));
}

// Keys as [keys][factors of a key].
template <class T>
TARGET void pack_keys(const Problem& problem, int64_t g, int64_t first, int keys, Factor* out) {
    const T* k = static_cast<const T*>(problem.k) + first * problem.k_strides[0] + g * problem.k_strides[1];
    for (int j = 0; j < keys; ++j, k += problem.k_strides[0], out += problem.factors) {
        fetch_next(k, problem.k_strides[0], problem.D);
        pack_vector(k, problem.k_strides[2], problem.D, out, 1);
    }
}

// Values as [keys][Dv] floats or [keys / 2][Dv] pairs, behind an odd key a 0.
template <bool kPairs, class T>
TARGET void pack_values(const Problem& problem, int64_t g, int64_t first, int keys, Factor* out) {
    const int64_t row = problem.v_strides[0], stride = problem.v_strides[2], Dv = problem.Dv;
    const T* v = static_cast<const T*>(problem.v) + first * row + g * problem.v_strides[1];
    constexpr int kStep = 1 + kPairs;
    for (int j = 0; j < keys; j += kStep, v += kStep * row, out += Dv) {
        const bool pairs_up = j + 1 < keys;
        const T* next = pairs_up ? v + row : v;
        fetch_next(v, row, Dv);
        if (kPairs) fetch_next(next, row, Dv);
        if (stride == 1) {
            pack<kPairs>(v, next, 1, Dv, out, 1);
        } else {
            pack<kPairs>(v, next, stride, Dv, out, 1);
        }
        if (kPairs && !pairs_up) {
            for (int64_t d = 0; d < Dv; ++d) out[d] &= 0xffff;
        }
    }
}

// Applies soft-cap and mask to the products of one vector of queries, [keys][kVectors]; returns the greatest of each.
template <bool kMasked>
TARGET Floats finish_scores(const Problem& problem, const Tile& tile, int vector, int64_t first, int keys,
                            Floats* scores) {
    const Ints row = reinterpret_cast<const Ints*>(tile.row)[vector];
    const Ints depth = reinterpret_cast<const Ints*>(tile.depth)[vector];
    const Floats hidden = splat(-INFINITY);
    const bool capped = problem.softcap != 0;
    Floats top = hidden;
    if (!kMasked && !capped) {  // four chains of maxima: one would take its latency for each key
        Floats tops[4] = {hidden, hidden, hidden, hidden};
        int j = 0;
        for (; j + 4 <= keys; j += 4) {
            for (int i = 0; i < 4; ++i) tops[i] = maximum(tops[i], scores[(j + i) * kVectors]);
        }
        for (; j < keys; ++j) top = maximum(top, scores[j * kVectors]);
        return maximum(top, maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
    }
    for (int j = 0; j < keys; ++j, scores += kVectors) {
        Floats score = *scores;
        if (capped) score = tanh(score * problem.cap_unit);
        if (kMasked) {
            const int32_t key = static_cast<int32_t>(first) + j;
            Ints visible = (row >= key) & (row < problem.end_k[key]);
            if (problem.window) visible &= depth - problem.depth_k[key] < problem.window;
            score = visible ? score : hidden;
        }
        if (kMasked || capped) *scores = score;
        top = maximum(top, score);
    }
    return top;
}

#if PAIRS
// Lane by lane a pair, each rounded to bfloat16.
TARGET inline Floats pair_up(Floats even, Floats odd) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (Floats)_mm512_permutexvar_epi16(interleave, (__m512i)both);
}
#endif

// Turns finished products into weights exp((product - top) * unit), as factors; returns their sum. The difference comes
// first: where weights are large it is exact, and the greatest is 1 whatever the unit is rounded to.
TARGET inline Floats soften(float unit, Floats top, int keys, Floats* scores) {
    const float factor = unit * kLog2E;
    Floats sum = {};
#if PAIRS
    Floats* weights = scores;  // overtakes no score: two become one
    if (keys % 2) scores[keys * kVectors] = splat(-INFINITY);
    for (int j = 0; j < keys; j += 2, scores += 2 * kVectors, weights += kVectors) {
        const Floats even = exp2((scores[0] - top) * factor), odd = exp2((scores[kVectors] - top) * factor);
        sum += even + odd;
        *weights = pair_up(even, odd);
    }
#else
    for (int j = 0; j < keys; ++j, scores += kVectors) {
        *scores = exp2((*scores - top) * factor);
        sum += *scores;
    }
#endif
    return sum;
}

// The products of a tile's queries with keys.
TARGET inline void score_keys(const Problem& problem, const Tile& tile, const Seeing& some, const Factor* k, int keys,
                              Floats* scores) {
    const int64_t factors = problem.factors;
    multiply<false>(k, keys, factors, 1, reinterpret_cast<const Ints*>(tile.q) + some.first, factors, nullptr,
                    scores + some.first, some.end - some.first);
}

// One tile of queries, as far as it sees any, and one of keys.
TARGET inline void attend_tile(const Problem& problem, Tile& tile, const Seeing& some, const Factor* k, const Factor* v,
                               int64_t first, int keys, Floats* scores) {
    score_keys(problem, tile, some, k, keys, scores);
    Floats *top = reinterpret_cast<Floats*>(tile.top), *total = reinterpret_cast<Floats*>(tile.total);
    Floats rescale[kVectors];
    for (int m = some.first; m < some.end; ++m) {
        const auto finish = some.masked ? finish_scores<true> : finish_scores<false>;
        const Floats before = top[m];
        top[m] = maximum(finish(problem, tile, m, first, keys, scores + m), before);
        rescale[m] = exp2((before - top[m]) * (problem.unit * kLog2E));
        const Floats kept = total[m] * rescale[m];  // rounded before the sum, as in attend_few
        total[m] = kept + soften(problem.unit, top[m], keys, scores + m);
    }
    multiply<false>(v, problem.Dv, 1, problem.Dv, reinterpret_cast<const Ints*>(scores) + some.first,
                    (keys + kPerFactor - 1) / kPerFactor, rescale + some.first, tile.out + some.first,
                    some.end - some.first);
}

// Neighbouring queries of a tile, all of those among them that see some key of a tile of keys.
struct Few {
    int first, count;
};

TARGET inline Few few(const Problem& problem, const KeyTile& keys, const Tile& tile, const Seeing& some) {
    if ((some.end - some.first - 2) * LANES >= kFew) return {0, kQueries};  // too many, whichever see it
    int first = 0, end = 0;
    for (int n = some.first * LANES; n < std::min(some.end * LANES, tile.count); ++n) {
        const Range row{tile.row[n], tile.row[n]}, depth{tile.depth[n], tile.depth[n]};
        if (see(problem, keys, row, depth) == View::kNone) continue;
        if (end == 0) first = n;
        end = n + 1;
    }
    return {first, end - first};
}

// Halves of the lanes of x and y, lane by lane in turn.
TARGET inline Ints zip_low(Ints x, Ints y) {
#if LANES == 16
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LANES == 8
    return __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shufflevector(x, y, 0, 4, 1, 5);
#endif
}
TARGET inline Ints zip_high(Ints x, Ints y) {
#if LANES == 16
    return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
    return __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

// Each turn makes the highest bit of a number's row the lowest of its lane, and the other way round.
TARGET inline void transpose(Ints (&x)[LANES]) {
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2) {
        Ints turned[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            turned[2 * i] = zip_low(x[i], x[i + LANES / 2]);
            turned[2 * i + 1] = zip_high(x[i], x[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) x[i] = turned[i];
    }
}

// Packed keys as [factors][kVectors], a key a lane, 0 in lanes behind the last.
TARGET inline void turn_keys(const Factor* k, int keys, int64_t factors, Ints* out) {
    for (; keys > 0; keys -= LANES, k += LANES * factors, ++out) {
        int64_t f = 0;
        for (; keys >= LANES && f + LANES <= factors; f += LANES) {
            Ints block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) block[i] = load<Ints>(k + i * factors + f);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) out[(f + i) * kVectors] = block[i];
        }
        for (; f < factors; ++f) {
            for (int i = 0; i < LANES; ++i) {
                reinterpret_cast<Factor*>(out + f * kVectors)[i] = i < keys ? k[i * factors + f] : 0;
            }
        }
    }
}

// Which keys of a tile a query sees.
TARGET inline void see_keys(const Problem& problem, int32_t row, int32_t depth, int64_t first, int keys,
                            int32_t (&sees)[kQueries]) {
    for (int j = 0; j < keys; ++j) {
        const int64_t key = first + j;
        sees[j] = -static_cast<int32_t>(row >= key && row < problem.end_k[key]);
        if (problem.window) sees[j] &= -static_cast<int32_t>(depth - problem.depth_k[key] < problem.window);
    }
}

// attend_tile of a few queries, of floats: keys lie along the lanes of the scores, and components along those of the
// sums of values. The same numbers are summed in the same order, but for zeros, so that the bits are the same.
TARGET inline void attend_few(const Problem& problem, Tile& tile, const Few& few, const Factor* k, const Factor* v,
                              int64_t first, int keys, Ints* turned) {
    alignas(64) int32_t sees[kFew][kQueries] = {};
    int from = keys, to = 0;
    for (int n = 0; n < few.count; ++n) {
        see_keys(problem, tile.row[few.first + n], tile.depth[few.first + n], first, keys, sees[n]);
        for (int j = 0; j < from; ++j) from = sees[n][j] ? j : from;
        for (int j = keys; j > to; --j) to = sees[n][j - 1] ? j : to;
    }
    if (from >= to) return;
    from -= from % LANES;
    const int vectors = (to - from + LANES - 1) / LANES;
    turn_keys(k + from * problem.factors, to - from, problem.factors, turned);
    Floats scores[kFew][kVectors], sums[kFew][kVectors];
    multiply<false>(tile.q + few.first, few.count, 1, kQueries, turned, problem.factors, nullptr, scores[0], vectors);
    const float factor = problem.unit * kLog2E;
    float rescale[kFew];
    for (int n = 0; n < few.count; ++n) {
        float &top = tile.top[few.first + n], before = top, sum = 0;
        alignas(64) float each[LANES];
        Floats greatest = splat(top);
        for (int c = 0; c < vectors; ++c) {
            Floats& score = scores[n][c];
            if (problem.softcap != 0) score = tanh(score * problem.cap_unit);
            score = reinterpret_cast<const Ints*>(sees[n] + from)[c] ? score : splat(-INFINITY);
            greatest = maximum(score, greatest);
        }
        std::memcpy(each, &greatest, sizeof each);
        for (int half = LANES / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) each[i] = std::max(each[i], each[i + half]);
        }
        top = each[0];
        const Floats shrunk = exp2(splat((before - top) * factor));
        rescale[n] = shrunk[0];
        const float kept = tile.total[few.first + n] * rescale[n];
        for (int c = 0; c < vectors; ++c) scores[n][c] = exp2((scores[n][c] - top) * factor);
        for (int j = 0; j < to - from; ++j) sum += reinterpret_cast<const float*>(scores[n])[j];
        tile.total[few.first + n] = kept + sum;
    }
    v += from * problem.Dv;
    for (int64_t d = 0; d < problem.Dv; d += kQueries) {
        const int64_t size = std::min<int64_t>(kQueries, problem.Dv - d);
        multiply<false>(reinterpret_cast<const Factor*>(scores[0]), few.count, kQueries, 1,
                        reinterpret_cast<const Ints*>(v + d), to - from, nullptr, sums[0],
                        static_cast<int>(size / LANES), problem.Dv / LANES);
        float* out = reinterpret_cast<float*>(tile.out + d * kVectors) + few.first;
        for (int64_t i = 0; i < size; ++i, out += kQueries) {
            for (int n = 0; n < few.count; ++n) {
                out[n] = rescale[n] * out[n] + reinterpret_cast<const float*>(sums[n])[i];
            }
        }
    }
}

TARGET inline bool any(Ints lanes) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#else
    int32_t some = 0;
    for (int i = 0; i < LANES; ++i) some |= lanes[i];
    return some;
#endif
}

// Adds keys [from, to) of a tile to the open group, one after the other; products become weights.
TARGET void add_keys(const Problem& problem, Tile& tile, const Seeing& some, const Factor* v, int from, int to,
                     Floats* scores) {
    if (from == to) return;
    scores += from * kVectors;
    const float factor = problem.unit * kLog2E;
    for (int m = some.first; m < some.end; ++m) {
        const Floats top = reinterpret_cast<const Floats*>(tile.top)[m];
        Floats total = reinterpret_cast<Floats*>(tile.open_total)[m];
        for (int j = 0; j < to - from; ++j) {
            total += scores[j * kVectors + m] = exp2((scores[j * kVectors + m] - top) * factor);
        }
        reinterpret_cast<Floats*>(tile.open_total)[m] = total;
    }
    multiply<true>(v + from * problem.Dv, problem.Dv, 1, problem.Dv, reinterpret_cast<const Ints*>(scores) + some.first,
                   to - from, nullptr, tile.open + some.first, some.end - some.first);
}

// Ends the open group of the queries in `ends`, or of all, of a some.
TARGET void close_group(const Problem& problem, Tile& tile, const Seeing& some, const Ints* ends) {
    for (int m = some.first; m < some.end; ++m) {
        const Ints here = ends ? ends[m] : Ints{} - 1;
        const auto close = [&](Floats& sum, Floats& open) TARGET {
            sum += here ? open : Floats{};
            open = here ? Floats{} : open;
        };
        close(reinterpret_cast<Floats*>(tile.total)[m], reinterpret_cast<Floats*>(tile.open_total)[m]);
        for (int64_t d = 0; d < problem.Dv; ++d) close(tile.out[d * kVectors + m], tile.open[d * kVectors + m]);
    }
}

// Makes the products of one key what weights refer to where they are more than `rise` above it.
TARGET void raise(const Problem& problem, Tile& tile, const Seeing& some, const Floats* scores, float rise) {
    for (int m = some.first; m < some.end; ++m) {
        Floats& top = reinterpret_cast<Floats*>(tile.top)[m];
        const Floats before = top;
        top = scores[m] > before + rise ? scores[m] : before;
        const Floats rescale = exp2((before - top) * (problem.unit * kLog2E));  // 1 where nothing rose
        reinterpret_cast<Floats*>(tile.total)[m] *= rescale;
        reinterpret_cast<Floats*>(tile.open_total)[m] *= rescale;
        for (int64_t d = 0; d < problem.Dv; ++d) {
            tile.out[d * kVectors + m] *= rescale;
            tile.open[d * kVectors + m] *= rescale;
        }
    }
}

// attend_tile of an invariant call: what is done for a query is a function of its path, wherever on the stack that
// lies, since a key it does not see adds 0. Weights refer to the path's first product until one is kRise above (the
// greatest so far, as in attend_tile, would be known only for tiles); weights and weighted values are added key by key,
// in a group of their own for each kGroup tokens of depth.
TARGET inline void attend_tile_in_order(const Problem& problem, Tile& tile, const Seeing& some, const Factor* k,
                                        const Factor* v, int64_t first, int keys, Floats* scores) {
    score_keys(problem, tile, some, k, keys, scores);
    const float rise = kRise / (problem.unit * kLog2E);
    bool rises = false;
    for (int m = some.first; m < some.end; ++m) {
        const auto finish = some.masked ? finish_scores<true> : finish_scores<false>;
        const Floats greatest = finish(problem, tile, m, first, keys, scores + m);
        Floats& top = reinterpret_cast<Floats*>(tile.top)[m];
        for (int j = 0; j < keys && any(top == kLowest); ++j) {
            const Floats score = scores[j * kVectors + m];
            top = ((top == kLowest) & (score > -INFINITY)) ? score : top;
        }
        rises |= any(greatest > top + rise);
    }
    int from = 0;
    for (int j = 0; j < keys; ++j) {
        const Floats* key = scores + j * kVectors;
        bool rises_here = false;
        for (int m = some.first; rises && m < some.end; ++m) {
            rises_here |= any(key[m] > reinterpret_cast<const Floats*>(tile.top)[m] + rise);
        }
        if (rises_here) {
            add_keys(problem, tile, some, v, std::exchange(from, j), j, scores);
            raise(problem, tile, some, key, rise);
        }
        if (problem.depth_k[first + j] % kGroup == kGroup - 1) {
            Ints sees[kVectors];
            for (int m = some.first; m < some.end; ++m) sees[m] = key[m] > -INFINITY;
            add_keys(problem, tile, some, v, std::exchange(from, j + 1), j + 1, scores);
            close_group(problem, tile, some, sees);
        }
    }
    add_keys(problem, tile, some, v, from, keys, scores);
}

template <class T>
TARGET void store_tile(const Problem& problem, int64_t g, const Tile& tile) {
    const int64_t heads = problem.H / problem.G, Dv = problem.Dv;
    for (int m = 0; m < tile.vectors; ++m) {
        const Floats total = reinterpret_cast<const Floats*>(tile.total)[m],
                     share = total > 0.0f ? 1.0f / total : Floats{};
        for (int64_t d = 0; d < Dv; ++d) {
            Floats& out = tile.out[d * kVectors + m];
            out = out * share + 0.0f;  // never -0, which what a query does not see might have made of 0
        }
    }
    const float* from = reinterpret_cast<const float*>(tile.out);
    for (int n = 0; n < tile.count; ++n, ++from) {
        const int64_t t = (tile.first + n) / heads, h = g * heads + (tile.first + n) % heads, at = t * problem.H + h;
        T* out = static_cast<T*>(problem.out) + at * Dv;
        for (int64_t d = 0; d < Dv; ++d) out[d] = nearest<T>(from[d * kQueries]);
        const bool only_sink = problem.sinks && tile.total[n] == 1 && tile.top[n] == problem.sinks[h] / problem.unit;
        const double lse =
            static_cast<double>(tile.top[n]) * problem.unit + std::log(static_cast<double>(tile.total[n]));
        problem.lse[at] = only_sink ? problem.sinks[h] : static_cast<float>(lse);
    }
}

// Some consecutive tiles of queries of some key/value heads: each tile of keys is packed once for all those of a head.
template <class T>
TARGET void attend(const Problem& problem, Span heads, Span queries, char* workspace) {
    const auto take = [&](int64_t floats) {
        return reinterpret_cast<float*>(std::exchange(workspace, workspace + round_up(floats * sizeof(float))));
    };
    Factor* k = reinterpret_cast<Factor*>(take(kKeys * problem.factors));
    Factor* v = reinterpret_cast<Factor*>(take(kKeys * problem.Dv));
    Floats* scores = reinterpret_cast<Floats*>(take(kKeys * kQueries));
    Ints* turned = reinterpret_cast<Ints*>(take(kQueries * problem.factors));
    const bool knows_few = !PAIRS && !problem.batch_invariant && problem.Dv % LANES == 0;
    Tile tiles[kMaxTiles];
    const auto pack_v = problem.batch_invariant ? pack_values<false, T> : pack_values<PAIRS, T>;
    const auto attend_to = problem.batch_invariant ? attend_tile_in_order : attend_tile;
    const int64_t per_head = queries.last - queries.first, num_tiles = (heads.last - heads.first) * per_head;
    const auto head_of = [&](int64_t i) { return heads.first + i / per_head; };
    Range rows;
    for (int64_t i = 0; i < num_tiles; ++i) {
        tiles[i].q = reinterpret_cast<Factor*>(take(problem.factors * kQueries));
        tiles[i].out = reinterpret_cast<Floats*>(take(problem.Dv * kQueries));
        tiles[i].open = problem.batch_invariant ? reinterpret_cast<Floats*>(take(problem.Dv * kQueries)) : nullptr;
        load_tile<T>(problem, head_of(i), (queries.first + i % per_head) * kQueries, tiles[i]);
        rows.include(tiles[i].rows.least);
        rows.include(tiles[i].rows.greatest);
    }
    for (const KeyTile& key_tile : problem.key_tiles) {
        if (key_tile.first > rows.greatest) break;
        int64_t packed = -1;
        for (int64_t i = 0; i < num_tiles; ++i) {
            if (see(problem, key_tile, tiles[i].rows, tiles[i].depths) == View::kNone) continue;
            const Seeing some = seeing(problem, key_tile, tiles[i]);
            if (some.first >= some.end) continue;
            if (const int64_t g = head_of(i); std::exchange(packed, g) != g) {
                pack_keys<T>(problem, g, key_tile.first, key_tile.count, k);
                pack_v(problem, g, key_tile.first, key_tile.count, v);
            }
            const Few some_few = knows_few ? few(problem, key_tile, tiles[i], some) : Few{0, kQueries};
            if (some_few.count <= kFew) {
                attend_few(problem, tiles[i], some_few, k, v, key_tile.first, key_tile.count, turned);
            } else {
                attend_to(problem, tiles[i], some, k, v, key_tile.first, key_tile.count, scores);
            }
        }
    }
    for (int64_t i = 0; i < num_tiles; ++i) {
        if (problem.batch_invariant) close_group(problem, tiles[i], {0, tiles[i].vectors, false}, nullptr);
        store_tile<T>(problem, head_of(i), tiles[i]);
    }
}
