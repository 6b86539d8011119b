// Gradients of attention from a block of queries and keys, compiled once for each instruction set. Like the forward's,
// tiles of scores have queries along the lanes, where weights come out of the forward's very products and its lse; the
// sums over keys and over queries are the same product of broadcast rows again.

#include "trie_attention_tile.h"

// Of the forward's tile, top holds lse, total holds delta and out holds grad_out as [factors][kQueries].
struct QueryTile : Tile {
    alignas(64) float grad_lse[kQueries];
    Factor *q_rows, *grad_out_rows;  // as pack_rows makes them, in blocks of kQueries columns
};

struct Workspace {
    QueryTile tiles[kMaxTiles];
    Factor *k, *v;    // [keys][factors]
    Factor* k_rows;   // [keys / kPerFactor][D]
    Floats* weights;  // [keys][kVectors], then as factors [keys][queries / kPerFactor]
    Floats* slopes;   // the gradients of scores, alike
    Floats* pairs;    // those as [keys / kPerFactor][kQueries]
};

// What is the second factor of a product over rows: [columns / width][rows / kPerFactor][width], behind an odd row a 0.
template <class T>
TARGET void pack_rows(const T* const* rows, int count, int64_t stride, int64_t columns, int64_t width, Factor* out) {
    for (int64_t first = 0; first < columns; first += width) {
        const int64_t size = std::min(width, columns - first);
        for (int n = 0; n < count; n += kPerFactor, out += width) {
            const bool pairs_up = n + 1 < count;
            const T *low = rows[n] + first * stride, *high = pairs_up ? rows[n + 1] + first * stride : low;
            if (stride == 1) {
                pack<PAIRS>(low, high, 1, size, out, 1);
            } else {
                pack<PAIRS>(low, high, stride, size, out, 1);
            }
            for (int64_t i = 0; PAIRS && !pairs_up && i < size; ++i) out[i] &= 0xffff;
            std::fill(out + size, out + width, 0);
        }
    }
}

template <class T>
TARGET void load_queries(Backward& problem, int64_t g, int64_t first, QueryTile& tile) {
    load_tile<T>(problem, g, first, tile);
    const int64_t heads = problem.H / problem.G, Dv = problem.Dv, *strides = problem.grad_out_strides;
    const T *q[kQueries], *grad_out[kQueries];
    Factor *grad_out_factors = reinterpret_cast<Factor*>(tile.out), *out_factors = tile.grad_out_rows;
    const auto index = [&](int n) { return (first + n) / heads * problem.H + g * heads + (first + n) % heads; };
    for (int n = 0; n < tile.count; ++n) {
        const int64_t t = index(n) / problem.H, h = index(n) % problem.H;
        q[n] = static_cast<const T*>(problem.q) + t * problem.q_strides[0] + h * problem.q_strides[1];
        grad_out[n] = static_cast<const T*>(problem.grad_out) + t * strides[0] + h * strides[1];
        pack_vector(grad_out[n], strides[2], Dv, grad_out_factors + n, kQueries);
        pack_vector(static_cast<const T*>(problem.out) + index(n) * Dv, 1, Dv, out_factors + n, kQueries);
    }
    // Summed like the products with values: where a query sees but one key, the two are then equal to the bit.
    Floats deltas[kVectors] = {};
    for (int64_t i = 0; i < problem.value_factors * kVectors; ++i) {
        deltas[i % kVectors] = multiply_add<PAIRS>(deltas[i % kVectors], reinterpret_cast<const Ints*>(out_factors)[i],
                                                   reinterpret_cast<const Ints*>(grad_out_factors)[i]);
    }
    std::memcpy(tile.total, deltas, sizeof deltas);
    for (int n = 0; n < kQueries; ++n) {
        const bool inside = n < tile.count;
        tile.top[n] = inside ? std::max(problem.lse[index(n)], kLowest) : 0;  // where nothing is seen it is -inf
        tile.grad_lse[n] = inside ? problem.grad_lse[index(n)] : 0;
        if (!inside) tile.total[n] = 0;
        if (inside) problem.delta[index(n)] = tile.total[n];
    }
    pack_rows(q, tile.count, problem.q_strides[2], problem.D, kQueries, tile.q_rows);
    pack_rows(grad_out, tile.count, strides[2], Dv, kQueries, tile.grad_out_rows);
}

template <class T>
TARGET void load_keys(Backward& problem, int64_t g, const KeyTile& tile, Workspace& at) {
    const T *k[kKeys], *v = static_cast<const T*>(problem.v) + g * problem.v_strides[1];
    for (int j = 0; j < tile.count; ++j) {
        const int64_t row = tile.first + j;
        k[j] = static_cast<const T*>(problem.k) + row * problem.k_strides[0] + g * problem.k_strides[1];
        pack_vector(v + row * problem.v_strides[0], problem.v_strides[2], problem.Dv, at.v + j * problem.value_factors,
                    1);
    }
    pack_keys<T>(problem, g, tile.first, tile.count, at.k);
    if (PAIRS) pack_rows(k, tile.count, problem.k_strides[2], problem.D, problem.D, at.k_rows);
}

// Of one vector of queries: scores become weights exp(score - lse), and the gradients of weights those of scores.
TARGET inline void descend(const Backward& problem, const QueryTile& tile, int vector, int keys, Floats* scores,
                           Floats* slopes) {
    const bool capped = problem.softcap != 0;
    const Floats lse = reinterpret_cast<const Floats*>(tile.top)[vector];
    const Floats delta = reinterpret_cast<const Floats*>(tile.total)[vector];
    const Floats grad_lse = reinterpret_cast<const Floats*>(tile.grad_lse)[vector];
    for (int j = 0; j < keys; ++j, scores += kVectors, slopes += kVectors) {
        const Floats score = *scores, weight = exp2((score * problem.unit - lse) * kLog2E);
        Floats slope = weight * (*slopes - delta + grad_lse);
        if (capped) slope = weight > 0.0f ? slope * ((1.0f - score) * (1.0f + score)) : Floats{};
        *scores = weight;
        *slopes = slope;
    }
}

#if PAIRS
// Rows of floats become factors of neighbouring queries, in place: a row overtakes none.
TARGET inline void pair_queries(int keys, Floats* rows) {
    for (int i = 0; i < keys * kVectors / 2; ++i) {
        rows[i] = (Floats)_mm512_cvtne2ps_pbh((__m512)rows[2 * i + 1], (__m512)rows[2 * i]);
    }
}

// Factors of neighbouring keys.
TARGET inline void pair_keys(int keys, const Floats* rows, Floats* pairs) {
    for (int j = 0; j < keys; j += 2, rows += 2 * kVectors, pairs += kVectors) {
        for (int m = 0; m < kVectors; ++m) pairs[m] = pair_up(rows[m], j + 1 < keys ? rows[kVectors + m] : Floats{});
    }
}
#endif

// sums = factor * sums + x @ y, a block of kQueries columns after the other.
TARGET inline void sum_over_queries(const Floats* x, int keys, const Factor* y, int count, int64_t columns,
                                    const Floats* factor, float* sums) {
    const int steps = (count + kPerFactor - 1) / kPerFactor;
    for (; columns > 0; columns -= kQueries, y += steps * kQueries, sums += kKeys * kQueries) {
        const int vectors = static_cast<int>(std::min<int64_t>(kVectors, (columns + LANES - 1) / LANES));
        multiply<false>(reinterpret_cast<const Factor*>(x), keys, kQueries / kPerFactor, 1,
                        reinterpret_cast<const Ints*>(y), steps, factor, reinterpret_cast<Floats*>(sums), vectors);
    }
}

// One tile of queries and one of keys.
TARGET inline void accumulate_tile(const Backward& problem, const KeyTile& key, bool masked, const QueryTile& tile,
                                   const Workspace& at, QuerySums& query_sums, KeySums& key_sums) {
    multiply<false>(at.k, key.count, problem.factors, 1, reinterpret_cast<const Ints*>(tile.q), problem.factors,
                    nullptr, at.weights, tile.vectors);
    multiply<false>(at.v, key.count, problem.value_factors, 1, reinterpret_cast<const Ints*>(tile.out),
                    problem.value_factors, nullptr, at.slopes, tile.vectors);
    for (int m = 0; m < tile.vectors; ++m) {
        const auto finish = masked ? finish_scores<true> : finish_scores<false>;
        if (masked || problem.softcap) finish(problem, tile, m, key.first, key.count, at.weights + m);
        descend(problem, tile, m, key.count, at.weights + m, at.slopes + m);
    }
#if PAIRS
    pair_keys(key.count, at.slopes, at.pairs);
    pair_queries(key.count, at.slopes);
    pair_queries(key.count, at.weights);
#endif
    Floats ones[kVectors];
    std::fill_n(ones, kVectors, splat(1.0f));
    const Floats* query_factor = std::exchange(query_sums.begun, true) ? ones : nullptr;
    const Floats* key_factor = std::exchange(key_sums.begun, true) ? ones : nullptr;
    multiply<false>(at.k_rows, problem.D, 1, problem.D, reinterpret_cast<const Ints*>(at.pairs),
                    (key.count + kPerFactor - 1) / kPerFactor, query_factor, reinterpret_cast<Floats*>(query_sums.q),
                    tile.vectors);
    sum_over_queries(at.slopes, key.count, tile.q_rows, tile.count, problem.D, key_factor, key_sums.k);
    sum_over_queries(at.weights, key.count, tile.grad_out_rows, tile.count, problem.Dv, key_factor, key_sums.v);
}

// Adds to the sums of queries and keys what pairs of one of these tiles and one of those give. Whatever the cut, a
// query meets its tiles of keys from the last to the first, and a key those of queries from the first to the last.
template <class T>
TARGET void accumulate(Backward& problem, int64_t g, Span queries, Span keys, char* memory) {
    const auto take = [&](int64_t floats) {
        return reinterpret_cast<float*>(std::exchange(memory, memory + round_up(floats * sizeof(float))));
    };
    Workspace at;
    at.k = reinterpret_cast<Factor*>(take(kKeys * problem.factors));
    at.k_rows = PAIRS ? reinterpret_cast<Factor*>(take(kKeys / kPerFactor * problem.D)) : at.k;
    at.v = reinterpret_cast<Factor*>(take(kKeys * problem.value_factors));
    at.weights = reinterpret_cast<Floats*>(take(kKeys * kQueries));
    at.slopes = reinterpret_cast<Floats*>(take(kKeys * kQueries));
    at.pairs = PAIRS ? reinterpret_cast<Floats*>(take(kKeys / kPerFactor * kQueries)) : at.slopes;
    for (int64_t i = 0; i < problem.tiles_at_a_time; ++i) {
        at.tiles[i].q = reinterpret_cast<Factor*>(take(problem.factors * kQueries));
        at.tiles[i].out = reinterpret_cast<Floats*>(take(problem.Dv * kQueries));
        at.tiles[i].q_rows = reinterpret_cast<Factor*>(take(kQueries / kPerFactor * whole_blocks(problem.D)));
        at.tiles[i].grad_out_rows = reinterpret_cast<Factor*>(take(kQueries / kPerFactor * whole_blocks(problem.Dv)));
    }
    for (int64_t first = queries.first; first < queries.last; first += problem.tiles_at_a_time) {
        const int64_t count = std::min(problem.tiles_at_a_time, queries.last - first);
        bool loaded[kMaxTiles] = {};
        for (int64_t s = keys.last - 1; s >= keys.first; --s) {
            bool packed = false;
            for (int64_t i = 0; i < count; ++i) {
                const auto& [rows, depths] = problem.query_tiles[first + i];
                const View view = see(problem, problem.key_tiles[s], rows, depths);
                if (view == View::kNone) continue;
                if (!std::exchange(loaded[i], true)) load_queries<T>(problem, g, (first + i) * kQueries, at.tiles[i]);
                if (!std::exchange(packed, true)) load_keys<T>(problem, g, problem.key_tiles[s], at);
                accumulate_tile(problem, problem.key_tiles[s], view == View::kSome, at.tiles[i], at,
                                problem.query_sums[g * problem.query_tiles.size() + first + i],
                                problem.key_sums[g * problem.key_tiles.size() + s]);
            }
        }
    }
}

TARGET inline void multiply_all(float* sums, int64_t count, float scale) {
    for (int64_t i = 0; i < count / LANES; ++i) reinterpret_cast<Floats*>(sums)[i] *= scale;
}

template <class T>
TARGET void store_queries(Backward& problem, int64_t g, int64_t tile) {
    const int64_t heads = problem.H / problem.G, first = tile * kQueries, D = problem.head_size;
    const QuerySums& sums = problem.query_sums[g * problem.query_tiles.size() + tile];
    const bool begun = sums.begun && problem.D;
    if (begun) multiply_all(sums.q, D * kQueries, problem.scale);
    for (int64_t n = 0; n < std::min<int64_t>(kQueries, problem.T * heads - first); ++n) {
        const int64_t at = (first + n) / heads * problem.H + g * heads + (first + n) % heads;
        T* out = static_cast<T*>(problem.grad_q) + at * D;
        for (int64_t d = 0; d < D; ++d) out[d] = begun ? nearest<T>(sums.q[d * kQueries + n]) : T{};
    }
}

template <class T>
TARGET void store_rows(float* sums, bool begun, float scale, const KeyTile& tile, int64_t g, int64_t G, int64_t size,
                       void* grad) {
    if (begun) multiply_all(sums, whole_blocks(size) * kKeys, scale);
    for (int j = 0; j < tile.count; ++j) {
        T* out = static_cast<T*>(grad) + ((tile.first + j) * G + g) * size;
        for (int64_t d = 0; d < size; ++d) {
            out[d] = begun ? nearest<T>(sums[(d / kQueries * kKeys + j) * kQueries + d % kQueries]) : T{};
        }
    }
}

template <class T>
TARGET void store_keys(Backward& problem, int64_t g, int64_t tile) {
    const KeyTile& key = problem.key_tiles[tile];
    const KeySums& sums = problem.key_sums[g * problem.key_tiles.size() + tile];
    store_rows<T>(sums.k, sums.begun && problem.D, problem.scale, key, g, problem.G, problem.head_size, problem.grad_k);
    store_rows<T>(sums.v, sums.begun, 1, key, g, problem.G, problem.Dv, problem.grad_v);
}

template <class T>
Phases phases() {
    return {accumulate<T>, store_queries<T>, store_keys<T>};
}
