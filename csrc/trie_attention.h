// What trie_attention.cpp and trie_attention_backward.cpp share: the cut into tiles and what is known of each.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "native.h"

namespace icl {
namespace {

constexpr int kQueries = 64;                   // a tile's
constexpr int kKeys = 48;                      // even, for pairs
constexpr int kMaxTiles = 8;                   // of queries that share packed keys
constexpr int64_t kMaxStateBytes = 512 << 10;  // of those tiles, to stay in the second-level cache
constexpr int kGroup = 2 * kKeys;  // of an invariant call's path: a shared context's tiles then end where its groups do
constexpr float kRise = 8;         // in powers of 2: so far are an invariant call's weights above what they refer to
constexpr float kLog2E = 1.44269504f, kLowest = -std::numeric_limits<float>::max();

struct Range {
    int32_t least = std::numeric_limits<int32_t>::max(), greatest = std::numeric_limits<int32_t>::min();
    void include(int32_t x) {
        least = std::min(least, x);
        greatest = std::max(greatest, x);
    }
};

struct Span {
    int64_t first, last;  // of tiles or heads; the last is excluded
};

struct KeyTile {
    int64_t first;
    int count;
    Range ends, depths;
};

struct Problem : TrieAttention {
    std::vector<KeyTile> key_tiles;
    // A score is product * unit, a product q @ k or, with a soft-cap, tanh(q @ k * cap_unit). Tiles hold -q where scale
    // is below 0, so that units are above 0 and the greatest product is the greatest score.
    float unit, cap_unit;
    int64_t factors;  // of a query or key
};

enum class View { kNone, kSome, kAll };

// How much of a tile of keys a tile of queries sees, by the ranges of their rows and depths.
inline View see(const Problem& problem, const KeyTile& keys, const Range& rows, const Range& depths) {
    const int64_t last = keys.first + keys.count - 1;
    if (keys.first > rows.greatest || keys.ends.greatest <= rows.least) return View::kNone;
    if (problem.window && depths.least - keys.depths.greatest >= problem.window) return View::kNone;
    if (last > rows.least || keys.ends.least <= rows.greatest) return View::kSome;
    return problem.window && depths.greatest - keys.depths.least >= problem.window ? View::kSome : View::kAll;
}

// Checks the sizes; `per_factor` elements are multiplied at a time.
inline Problem describe(const TrieAttention& args, int64_t per_factor) {
    for (const int64_t size : {args.T, args.S, args.D, args.Dv}) require_range("size", size, 0);
    require_range("heads of k", args.G, 1);
    require_range("heads of q", args.H, 0);
    require_range("heads of q beyond a multiple of those of k", args.H % args.G, 0, 0);
    require_range("window", args.window, 0);
    // Differences of depths, which windows compare, would overflow; groups of invariant calls are counted from 0.
    for (int64_t t = 0; args.window && t < args.T; ++t) require_range("depth_q", args.depth_q[t], 0);
    Problem problem{args, {}, 0, 0, 0};
    if (problem.scale == 0) {  // all scores are 0: those of queries and keys without components
        problem.scale = 1;
        problem.D = 0;
    }
    problem.factors = (problem.D + per_factor - 1) / per_factor;
    const float scale = std::abs(problem.scale);
    problem.unit = problem.softcap ? problem.softcap : scale;
    problem.cap_unit = problem.softcap ? scale / problem.softcap : 0;
    for (int64_t first = 0; first < problem.S; first += kKeys) {
        KeyTile tile{first, static_cast<int>(std::min<int64_t>(kKeys, problem.S - first)), {}, {}};
        for (int64_t j = first; j < first + tile.count; ++j) {
            tile.ends.include(problem.end_k[j]);
            tile.depths.include(problem.depth_k[j]);
        }
        if (problem.window || problem.batch_invariant) require_range("depth_k", tile.depths.least, 0);
        problem.key_tiles.push_back(tile);
    }
    return problem;
}

}  // namespace
}  // namespace icl
