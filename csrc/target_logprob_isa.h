// What target_logprob does with vectors, written once: target_logprob.h includes this file for each instruction set,
// after defining ICL_ISA (the struct's name), ICL_TARGET (its function attribute), ICL_LANES (floats in a vector),
// ICL_SUMS (vectors of sums that fit the registers), ICL_VECTORS (most vectors of rows in a product) and ICL_PAIRS
// (whether products take bfloat16 in pairs, or floats one by one). Rows of `hidden` lie in the lanes and tokens one
// after the other, so that nothing of the softmax is ever summed across lanes.

struct ICL_ISA {
    static constexpr int kLanes = ICL_LANES, kVectors = ICL_VECTORS, kSums = ICL_SUMS;
    static constexpr int kUnit = ICL_PAIRS ? 2 : 1;  // elements multiplied at a time
    using Element = std::conditional_t<ICL_PAIRS, uint16_t, float>;
    using Unit = std::conditional_t<ICL_PAIRS, int32_t, float>;
    typedef float Floats __attribute__((vector_size(ICL_LANES * 4)));
    typedef int32_t Ints __attribute__((vector_size(ICL_LANES * 4)));
    typedef Unit Units __attribute__((vector_size(ICL_LANES * 4)));

    template <class Vector, class T>
    ICL_TARGET ICL_INLINE static Vector load(const T* from) {
        Vector vector;
        std::memcpy(&vector, from, sizeof(vector));
        return vector;
    }

    template <class T, class Vector>
    ICL_TARGET ICL_INLINE static void store(T* to, const Vector& vector) {
        std::memcpy(to, &vector, sizeof(vector));
    }

    ICL_TARGET ICL_INLINE static Floats multiply_add(Floats sum, Units a, Units b) {
#if ICL_PAIRS
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return sum + a * b;
#endif
    }

    // tile[c][r] = (first ? 0 : tile[c][r]) + the sum over k of weight(c, k) * rows[k][r], for C columns and N vectors
    // of rows. A column's weights lie side by side and the next column's `stride` elements further; or, across, those
    // of all columns for one k lie side by side and those for the next k further. Meanwhile the next C columns are
    // fetched.
    template <bool Across, int C, int N>
    ICL_TARGET static void products(const Element* weight, int64_t stride, const Element* rows, int64_t num_units,
                                    bool first, float* tile) {
        const int64_t column = Across ? kUnit : stride, step = Across ? stride : kUnit;
        Floats sum[C][N];
        for (int c = 0; c < C; ++c) {
            for (int n = 0; n < N; ++n) sum[c][n] = Floats{};
        }
        for (int64_t k = 0; k < num_units; ++k) {
            if (!Across && k % (kCacheLine / static_cast<int64_t>(sizeof(Unit))) == 0) {
                for (int c = 0; c < C; ++c) __builtin_prefetch(weight + (C + c) * column + k * step);
            }
            Units vectors[N];
            for (int n = 0; n < N; ++n) vectors[n] = load<Units>(rows + (k * N + n) * kLanes * kUnit);
            for (int c = 0; c < C; ++c) {
                Unit unit;
                std::memcpy(&unit, weight + c * column + k * step, sizeof(unit));
                const Units factor = unit - Units{};
                for (int n = 0; n < N; ++n) sum[c][n] = multiply_add(sum[c][n], factor, vectors[n]);
            }
        }
        for (int c = 0; c < C; ++c) {
            for (int n = 0; n < N; ++n) {
                float* to = tile + (c * N + n) * kLanes;
                store(to, first ? sum[c][n] : load<Floats>(to) + sum[c][n]);
            }
        }
    }

    // The same for one row and one column that lie as they are stored: a product read at the speed of memory.
    ICL_TARGET static float product(const Element* weight, const Element* hidden, int64_t size) {
        constexpr int64_t step = kLanes * kUnit;
        Floats sum[4] = {};
        int64_t k = 0;
        for (; k + 4 * step <= size; k += 4 * step) {
            for (int i = 0; i < 4; ++i) {
                sum[i] = multiply_add(sum[i], load<Units>(weight + k + i * step), load<Units>(hidden + k + i * step));
            }
        }
        for (; k + step <= size; k += step) {
            sum[0] = multiply_add(sum[0], load<Units>(weight + k), load<Units>(hidden + k));
        }
        sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float total = 0;
        for (; k < size; ++k) total += to_float(weight[k]) * to_float(hidden[k]);
        for (int i = 0; i < kLanes; ++i) total += sum[0][i];
        return total;
    }

    // exp of values at most 0, to 2 units in the last place: 2^n * 2^f with f in [-0.5, 0.5]; nan stays nan.
    ICL_TARGET ICL_INLINE static Floats exp(Floats x) {
        constexpr float kLog2E = 1.44269504f, kMagic = 12582912.0f + 127;  // 1.5 * 2^23 rounds to an integer
        x = x < -87.0f ? Floats{} - 87.0f : x;
        const Floats rounded = x * kLog2E + kMagic;
        const Floats f = x * kLog2E - (rounded - kMagic);
        Floats power = f * 1.32647271e-3f + 9.67151264e-3f;
        power = power * f + 5.55073374e-2f;
        power = power * f + 2.40222421e-1f;
        power = power * f + 6.93146978e-1f;
        power = power * f + 1.0f;
        return power * (Floats)((Ints)rounded << 23);
    }

    // softcap * tanh(x / softcap), by a polynomial where 1 - 2 / (exp(2x) + 1) would cancel.
    ICL_TARGET ICL_INLINE static Floats cap(Floats x, float softcap) {
        x = x / softcap;
        const Floats size = x < 0.0f ? -x : x, square = x * x;
        Floats small = square * -5.70498872745e-3f + 2.06390887954e-2f;
        small = small * square - 5.37397155531e-2f;
        small = small * square + 1.33314422036e-1f;
        small = small * square - 3.33332819422e-1f;
        small = small * square * x + x;
        const Floats decay = exp(-2 * size), large = (1 - decay) / (1 + decay);
        return softcap * (size < 0.625f ? small : x < 0.0f ? -large : large);
    }

    // A vector of rows of a tile of products, `stride` apart, becomes that of their logits.
    ICL_TARGET ICL_INLINE static void finish(float* tile, int64_t columns, int64_t stride, const float* bias,
                                             float scale, float softcap) {
        if (bias == nullptr && scale == 1 && softcap == 0) return;
        for (int64_t c = 0; c < columns; ++c, tile += stride) {
            const Floats x = (load<Floats>(tile) + (bias == nullptr ? 0.0f : bias[c])) * scale;
            store(tile, softcap == 0 ? x : cap(x, softcap));
        }
    }

    // Folds a tile of products, [columns][N vectors], into each row's maximum, where it is, and sum of exponentials;
    // leaves the logits in the tile.
    ICL_TARGET static void fold(float* tile, int64_t columns, int N, const float* bias, float scale, float softcap,
                                int32_t first_column, float* top, float* total, int32_t* best) {
        const int64_t stride = static_cast<int64_t>(N) * kLanes;
        for (int n = 0; n < N; ++n, tile += kLanes, top += kLanes, total += kLanes, best += kLanes) {
            finish(tile, columns, stride, bias, scale, softcap);
            const Floats old_top = load<Floats>(top);
            Floats new_top = old_top;
            for (int64_t c = 0; c < columns; ++c) {
                const Floats x = load<Floats>(tile + c * stride);
                new_top = x > new_top ? x : new_top;
            }
            // Maxima rise ever more rarely, so where they lie is looked up only then.
            for (int i = 0; i < kLanes; ++i) {
                if (!(new_top[i] > old_top[i])) continue;
                int64_t c = 0;
                while (tile[c * stride + i] != new_top[i]) ++c;
                best[i] = first_column + static_cast<int32_t>(c);
            }
            Floats sum{};
            for (int64_t c = 0; c < columns; ++c) sum += exp(load<Floats>(tile + c * stride) - new_top);
            store(total, load<Floats>(total) * exp(old_top - new_top) + sum);
            store(top, new_top);
        }
    }

    // A tile of products becomes that of their gradients, but for what the targets add, and `logits` that of logits.
    ICL_TARGET static void descend(float* logits, int64_t columns, int N, const float* bias, float scale, float softcap,
                                   const float* lse, const float* share, float* slopes) {
        const int64_t stride = static_cast<int64_t>(N) * kLanes;
        for (int n = 0; n < N; ++n, logits += kLanes, slopes += kLanes, lse += kLanes, share += kLanes) {
            finish(logits, columns, stride, bias, scale, softcap);
            const Floats row_lse = load<Floats>(lse), factor = load<Floats>(share) * scale;
            for (int64_t c = 0; c < columns; ++c) {
                const Floats x = load<Floats>(logits + c * stride), logp = x - row_lse;
                const Floats slope = factor * (logp < kLeastLogp ? Floats{} : exp(logp));
                const Floats y = x / softcap;  // the cap's slope is 1 - y * y
                store(slopes + c * stride, softcap == 0 ? slope : slope * ((1.0f - y) * (1.0f + y)));
            }
        }
    }

    // A tile of products becomes that of logits, and `top` their maximum in each row.
    ICL_TARGET static void rise(float* tile, int64_t columns, int N, const float* bias, float scale, float softcap,
                                float* top) {
        const int64_t stride = static_cast<int64_t>(N) * kLanes;
        for (int n = 0; n < N; ++n, tile += kLanes, top += kLanes) {
            finish(tile, columns, stride, bias, scale, softcap);
            Floats highest = Floats{} + std::numeric_limits<float>::lowest();
            for (int64_t c = 0; c < columns; ++c) {
                const Floats x = load<Floats>(tile + c * stride);
                highest = x > highest ? x : highest;
            }
            store(top, highest);
        }
    }

    // A vector of rows' maximum `top` becomes that of the tiles too, whose `tile_top` are `stride` apart, and `total`,
    // a sum of exponentials below it, what it is below the new one; so would other sums, times `decay`.
    ICL_TARGET static void settle(const float* tile_top, int64_t tiles, int64_t stride, float* top, float* total,
                                  float* decay) {
        const Floats old_top = load<Floats>(top);
        Floats new_top = old_top;
        for (int64_t t = 0; t < tiles; ++t) {
            const Floats x = load<Floats>(tile_top + t * stride);
            new_top = x > new_top ? x : new_top;
        }
        const Floats factor = exp(old_top - new_top);
        store(top, new_top);
        store(decay, factor);
        store(total, load<Floats>(total) * factor);
    }

    // Slopes of a tile of logits, exp(logit - top) times the cap's, and `total`, each row's sum of exponentials.
    ICL_TARGET static void weigh(const float* logits, int64_t columns, int N, float softcap, const float* top,
                                 float* slopes, float* total) {
        const int64_t stride = static_cast<int64_t>(N) * kLanes;
        for (int n = 0; n < N; ++n, logits += kLanes, slopes += kLanes, top += kLanes, total += kLanes) {
            const Floats row_top = load<Floats>(top);
            Floats sum{};
            for (int64_t c = 0; c < columns; ++c) {
                const Floats x = load<Floats>(logits + c * stride), below = x - row_top;
                const Floats weight = below < kLeastLogp ? Floats{} : exp(below);
                const Floats y = x / softcap;
                sum += weight;
                store(slopes + c * stride, softcap == 0 ? weight : weight * ((1.0f - y) * (1.0f + y)));
            }
            store(total, sum);
        }
    }

    // Vectors of rows, `size` of them that lie one after the other, times one of factors.
    ICL_TARGET static void rescale(float* rows, int64_t size, int64_t stride, const float* factor) {
        const Floats by = load<Floats>(factor);
        for (int64_t i = 0; i < size; ++i) store(rows + i * stride, load<Floats>(rows + i * stride) * by);
    }

#if ICL_PAIRS
    // A tile of slopes, [columns][N vectors], in bfloat16: as it is, and with each two columns' side by side.
    ICL_TARGET static void pair(const float* tile, int64_t columns, int N, Element* rows, Element* pairs) {
        for (int64_t c = 0; c < columns; ++c) {
            for (int n = 0; n < N; ++n, tile += kLanes, rows += kLanes) {
                typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
                const Halves rounded = (Halves)_mm512_cvtneps_pbh((__m512)load<Floats>(tile));
                std::memcpy(rows, &rounded, sizeof(rounded));
                Element* to = pairs + (c / 2 * N + n) * 2 * kLanes;
                const Ints wide = __builtin_convertvector(rounded, Ints);
                store(to, c % 2 == 0 ? wide : load<Ints>(to) | wide << 16);
            }
        }
    }
#endif

    // Rounds floats, `stride` apart.
    template <class To>
    ICL_TARGET static void round(const float* from, int64_t stride, int64_t size, To* to) {
        for (int64_t i = 0; i < size; ++i) to[i] = nearest<To>(from[i * stride]);
    }

    // Folds what the slices of the vocabulary found for a vector of rows, `stride` apart, into the first slice's place.
    ICL_TARGET static void merge(float* top, float* total, const int32_t* best, int64_t num_slices, int64_t stride,
                                 int32_t* argmax) {
        Floats new_top = load<Floats>(top), sum{};
        Ints where = load<Ints>(best);
        for (int64_t s = 1; s < num_slices; ++s) {
            const Floats x = load<Floats>(top + s * stride);
            where = x > new_top ? load<Ints>(best + s * stride) : where;
            new_top = x > new_top ? x : new_top;
        }
        for (int64_t s = 0; s < num_slices; ++s) {
            sum += load<Floats>(total + s * stride) * exp(load<Floats>(top + s * stride) - new_top);
        }
        store(top, new_top);
        store(total, sum);
        std::memcpy(argmax, &where, sizeof(where));
    }
};

#undef ICL_ISA
#undef ICL_TARGET
#undef ICL_LANES
#undef ICL_SUMS
#undef ICL_VECTORS
#undef ICL_PAIRS
