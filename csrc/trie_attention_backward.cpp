// The gradients of trie_attention on the CPU. Of each key/value head, keys and queries are cut into as many blocks, and
// the pairs of blocks on a diagonal share neither, so that threads add to the same sums without meeting, in one order
// whatever the cut. Scores are worked out once; memory beyond the results is a float for each of their elements.
#include "trie_attention.h"

namespace icl {
namespace {

// What is known of a tile of queries of a key/value head before it is loaded.
struct QueryRange {
    Range rows, depths;
};

// Gradients of a tile, to be multiplied by scale (but for v); begun: whether anything has been added yet.
struct QuerySums {
    float* q;  // [D][kQueries]
    bool begun;
};

struct KeySums {
    float *k, *v;  // [columns / kQueries][kKeys][kQueries]
    bool begun;
};

struct Backward : Problem, TrieAttentionGradients {
    int64_t head_size;  // of q and k, also where D is 0 because scale is
    int64_t value_factors, tiles_at_a_time;
    std::vector<QueryRange> query_tiles;
    std::vector<QuerySums> query_sums;  // [G * query tiles]
    std::vector<KeySums> key_sums;      // [G * key tiles]
};

int64_t whole_blocks(int64_t columns) { return (columns + kQueries - 1) / kQueries * kQueries; }

struct Phases {
    void (*accumulate)(Backward&, int64_t g, Span queries, Span keys, char* workspace);
    void (*store_queries)(Backward&, int64_t g, int64_t tile);
    void (*store_keys)(Backward&, int64_t g, int64_t tile);
};

}  // namespace
}  // namespace icl

#define TILES "trie_attention_backward_tile.h"
#define KERNEL phases
#include "versions.h"

namespace icl {

void trie_attention_backward(const TrieAttention& args, const TrieAttentionGradients& gradients) {
    const Version chosen = version(args.isa);
    const int64_t per_factor = args.bfloat16 ? chosen.bfloat16_per_factor : 1;
    Backward problem{describe(args, per_factor), gradients, args.D, 0, 0, {}, {}, {}};
    const int64_t D = args.D, Dv = problem.Dv, G = problem.G, heads = problem.H / G;
    problem.value_factors = (Dv + per_factor - 1) / per_factor;
    for (int64_t first = 0; first < problem.T * heads; first += kQueries) {
        QueryRange& tile = problem.query_tiles.emplace_back();
        for (int64_t t = first / heads; t * heads < std::min(first + kQueries, problem.T * heads); ++t) {
            tile.rows.include(problem.row_q[t]);
            tile.depths.include(problem.depth_q[t]);
        }
    }
    const int64_t query_tiles = problem.query_tiles.size(), key_tiles = problem.key_tiles.size();

    const int64_t of_queries = D * kQueries, of_keys = whole_blocks(D) * kKeys, of_values = whole_blocks(Dv) * kKeys;
    const auto sums = allocate(sizeof(float) * G * (query_tiles * of_queries + key_tiles * (of_keys + of_values)));
    float* at = reinterpret_cast<float*>(sums.get());
    const auto take = [&](int64_t floats) { return std::exchange(at, at + floats); };
    for (int64_t i = 0; i < G * query_tiles; ++i) problem.query_sums.push_back({take(of_queries), false});
    for (int64_t i = 0; i < G * key_tiles; ++i) problem.key_sums.push_back({take(of_keys), take(of_values), false});

    const int64_t shared = kKeys * (problem.factors + D + problem.value_factors + 3 * kQueries);
    const int64_t state = kQueries * (problem.factors + Dv + (whole_blocks(D) + whole_blocks(Dv)) / per_factor);
    const int64_t bytes_of_state = sizeof(float) * std::max<int64_t>(1, state);
    problem.tiles_at_a_time = std::clamp<int64_t>(kMaxStateBytes / bytes_of_state, 1, kMaxTiles);
    const int64_t bytes =
        round_up(sizeof(float) * shared + problem.tiles_at_a_time * (bytes_of_state + 4 * 64) + 6 * 64);
    const int64_t threads = max_threads();
    const auto workspace = allocate(threads * bytes);

    const auto [accumulate, store_queries, store_keys] = (problem.bfloat16 ? chosen.bfloat16 : chosen.float32)();
    std::fill_n(problem.delta, problem.T * problem.H, 0.0f);  // of queries that see nothing
    const int64_t most = std::max<int64_t>(1, std::min(query_tiles, key_tiles));
    const int64_t blocks = std::clamp<int64_t>((4 * threads + G - 1) / G, 1, most);
    for (int64_t diagonal = 1 - blocks; diagonal < blocks; ++diagonal) {
        const int64_t items = G * (blocks - std::abs(diagonal));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (items > 1)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t i = item / G + std::max<int64_t>(0, diagonal), j = i - diagonal;
            const Span queries{i * query_tiles / blocks, (i + 1) * query_tiles / blocks};
            const Span keys{j * key_tiles / blocks, (j + 1) * key_tiles / blocks};
            accumulate(problem, item % G, queries, keys, workspace.get() + thread_index() * bytes);
        }
    }
    const int64_t stored = query_tiles + key_tiles;
#pragma omp parallel for num_threads(threads) if (stored > 1)
    for (int64_t tile = 0; tile < stored; ++tile) {
        for (int64_t g = 0; g < G; ++g) {
            if (tile < query_tiles) {
                store_queries(problem, g, tile);
            } else {
                store_keys(problem, g, tile - query_tiles);
            }
        }
    }
}

}  // namespace icl
