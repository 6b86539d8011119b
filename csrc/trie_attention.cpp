// trie_attention on the CPU: cuts the work into items for threads and hands them to the best instruction set there is.
#include "trie_attention.h"

#define TILES "trie_attention_tile.h"
#define KERNEL attend
#include "versions.h"

namespace icl {

void trie_attention(const TrieAttention& args) {
    const Version chosen = version(args.isa);
    Problem problem = describe(args, args.bfloat16 ? chosen.bfloat16_per_factor : 1);
    const int64_t threads = max_threads();
    // As few items as keep the threads evenly busy; how tiles are grouped changes no bit of the result.
    const int64_t tiles = (problem.T * (problem.H / problem.G) + kQueries - 1) / kQueries;
    const int64_t outs = problem.batch_invariant ? 2 : 1;
    const int64_t state = sizeof(float) * kQueries * (problem.factors + outs * problem.Dv);
    const int64_t most = std::clamp<int64_t>(kMaxStateBytes / std::max<int64_t>(1, state), 1, kMaxTiles);
    const int64_t per_item = std::clamp<int64_t>(tiles * problem.G / (4 * threads), 1, most);
    // All heads of a tile at once, whose keys lie side by side, where that keeps the threads as busy.
    const int64_t heads = per_item == 1 && tiles % threads == 0 ? std::min(problem.G, most) : 1;
    const int64_t items_per_tile = (problem.G + heads - 1) / heads,
                  items = (tiles + per_item - 1) / per_item * items_per_tile;
    const int64_t shared =
        sizeof(float) * (kKeys * (problem.factors + problem.Dv + kQueries) + kQueries * problem.factors);
    const int64_t bytes = round_up(shared + heads * per_item * state + 64 * (4 + (1 + outs) * heads * per_item));
    const auto workspace = allocate(threads * bytes);
    const auto attend = problem.bfloat16 ? chosen.bfloat16 : chosen.float32;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (items > 1)
    for (int64_t item = items - 1; item >= 0; --item) {  // later queries see more keys: the longest items first
        const int64_t tile = item / items_per_tile * per_item, head = item % items_per_tile * heads;
        attend(problem, {head, std::min(head + heads, problem.G)}, {tile, std::min(tile + per_item, tiles)},
               workspace.get() + thread_index() * bytes);
    }
}

}  // namespace icl
