// trie_attention on the CPU: cuts the work into items for threads and hands them to the best instruction set there is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "icl.h"

namespace icl {
namespace {

constexpr int kQueries = 64;                   // a tile's
constexpr int kKeys = 48;                      // even, for pairs
constexpr int kMaxTiles = 8;                   // of queries that share packed keys
constexpr int64_t kMaxStateBytes = 512 << 10;  // of those tiles, to stay in the second-level cache
constexpr int kGroup = 2 * kKeys;  // of an invariant call's path: a shared context's tiles then end where its groups do
constexpr float kRise = 8;         // in powers of 2: so far are an invariant call's weights above what they refer to
constexpr float kLog2E = 1.44269504f, kLowest = -std::numeric_limits<float>::max();

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

// The upper half of a float is a bfloat16.
template <class T>
inline T truncate(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return {static_cast<uint16_t>(bits >> 16)};
    }
}

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Range {
    int32_t least = std::numeric_limits<int32_t>::max(), greatest = std::numeric_limits<int32_t>::min();
    void include(int32_t x) {
        least = std::min(least, x);
        greatest = std::max(greatest, x);
    }
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
View see(const Problem& problem, const KeyTile& keys, const Range& rows, const Range& depths) {
    const int64_t last = keys.first + keys.count - 1;
    // In 64 bits, since depths are not checked and their difference may overflow.
    const auto distance = [](int32_t depth_q, int32_t depth_k) { return static_cast<int64_t>(depth_q) - depth_k; };
    if (keys.first > rows.greatest || keys.ends.greatest <= rows.least) return View::kNone;
    if (problem.window && distance(depths.least, keys.depths.greatest) >= problem.window) return View::kNone;
    if (last > rows.least || keys.ends.least <= rows.greatest) return View::kSome;
    return problem.window && distance(depths.greatest, keys.depths.least) >= problem.window ? View::kSome : View::kAll;
}

namespace portable {
#define TARGET
#define LANES 4
#define PAIRS 0
#include "trie_attention_tile.h"
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define PAIRS 0
#include "trie_attention_tile.h"
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define LANES 16
#define PAIRS 0
#include "trie_attention_tile.h"
#undef TARGET
#undef PAIRS
}  // namespace avx512

namespace avx512bf16 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define PAIRS 1
#include "trie_attention_tile.h"
#undef TARGET
#undef LANES
#undef PAIRS
}  // namespace avx512bf16
#endif

using Attend = void (*)(const Problem&, int64_t, int64_t, int64_t, char*);

struct Version {
    Attend float32, bfloat16;
    int bfloat16_per_factor;
};

Version version(int isa) {
    switch (choose_isa(isa)) {
#if defined(__x86_64__)
        case kAvx512Bf16:
            return {avx512::attend<float>, avx512bf16::attend<Bf16>, 2};
        case kAvx512:
            return {avx512::attend<float>, avx512::attend<Bf16>, 1};
        case kAvx2:
            return {avx2::attend<float>, avx2::attend<Bf16>, 1};
#endif
        default:
            return {portable::attend<float>, portable::attend<Bf16>, 1};
    }
}

}  // namespace

void trie_attention(const TrieAttention& arguments) {
    const Version chosen = version(arguments.isa);
    Problem problem{arguments, {}, 0, 0, 0};
    if (problem.scale == 0) {  // all scores are 0: those of queries and keys without components
        problem.scale = 1;
        problem.D = 0;
    }
    const int64_t per_factor = problem.bf16 ? chosen.bfloat16_per_factor : 1;
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
        problem.key_tiles.push_back(tile);
    }

#ifdef _OPENMP
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    // As few items as keep the threads evenly busy; how tiles are grouped changes no bit of the result.
    const int64_t tiles = (problem.T * (problem.H / problem.G) + kQueries - 1) / kQueries;
    const int64_t outs = problem.invariant ? 2 : 1;
    const int64_t state = sizeof(float) * kQueries * (problem.factors + outs * problem.Dv);
    const int64_t most = std::clamp<int64_t>(kMaxStateBytes / std::max<int64_t>(1, state), 1, kMaxTiles);
    const int64_t per_item = std::clamp<int64_t>(tiles * problem.G / (4 * threads), 1, most);
    const int64_t items_per_head = (tiles + per_item - 1) / per_item, items = items_per_head * problem.G;
    const int64_t shared = sizeof(float) * kKeys * (problem.factors + problem.Dv + kQueries);
    const int64_t bytes = round_up(shared + per_item * state + 64 * (3 + (1 + outs) * per_item));
    const auto deleter = [](char* p) { ::operator delete[](p, std::align_val_t{64}); };
    const std::unique_ptr<char[], decltype(deleter)> workspace(
        static_cast<char*>(::operator new[](threads * bytes, std::align_val_t{64})), deleter);
    const Attend attend = problem.bf16 ? chosen.bfloat16 : chosen.float32;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (items > 1)
    for (int64_t item = items - 1; item >= 0; --item) {  // later queries see more keys: the longest items first
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num();
#else
        const int64_t thread = 0;
#endif
        const int64_t first = item / problem.G * per_item;
        attend(problem, item % problem.G, first, std::min(per_item, tiles - first), workspace.get() + thread * bytes);
    }
}

}  // namespace icl
