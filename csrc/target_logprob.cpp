// The output head fused with its softmax: blocks of logits are made, folded into each row's maximum and sum of
// exponentials, and overwritten while they are still in the cache.
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
#include <type_traits>

#include "icl.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace icl {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kMaxThreads = 32;
constexpr int64_t kSlices = 64;           // parts of the vocabulary that threads take turns at, summed up in order
constexpr int64_t kBlockColumns = 96;     // logits of a row in a tile
constexpr int64_t kBlockRows = 512;       // rows that share a pass over the weights ...
constexpr int64_t kBlockBytes = 4 << 20;  // ... fewer where they are so wide that they would take more than this
constexpr int64_t kDepthBytes = 512;      // of a row and a column, multiplied at a time: these stay in the L1 cache
constexpr int64_t kDotRows = 4;           // up to so many rows are not worth packing into lanes
constexpr float kLowest = std::numeric_limits<float>::lowest();

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

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
#define ICL_COLUMNS 4
#define ICL_VECTORS 2
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#if defined(__x86_64__)
#define ICL_ISA Avx2
#define ICL_TARGET __attribute__((target("avx2,fma")))
#define ICL_LANES 8
#define ICL_COLUMNS 6
#define ICL_VECTORS 2
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#define ICL_ISA Avx512
#define ICL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define ICL_LANES 16
#define ICL_COLUMNS 6
#define ICL_VECTORS 4
#define ICL_PAIRS 0
#include "target_logprob_isa.h"

#define ICL_ISA Avx512Bf16
#define ICL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define ICL_LANES 16
#define ICL_COLUMNS 6
#define ICL_VECTORS 4
#define ICL_PAIRS 1
#include "target_logprob_isa.h"
#endif

// Deals out the workspace; counts only, if it has none.
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

// How a call is cut up, and its workspace. Nothing here depends on the number of threads but the last three arrays, so
// neither does any result.
template <class K>
struct Work {
    using Element = typename K::Element;
    static constexpr int64_t kPanelRows = K::kLanes * K::kVectors;

    bool dot, direct;  // rows are multiplied one by one; weights are read where they are
    int64_t rows, depth, depth_step, slice_columns, num_slices, num_panels, tile_size, weight_size;
    Element* hidden;                      // panels [units of depth][rows of the panel][kUnit], or [rows][depth] to dot
    float *top, *total;                   // [slices][rows]
    int32_t *best, *argmax;               // [slices][rows], [rows]
    int32_t *first_target, *next_target;  // [slices][panels], [M]: chains of targets
    float *tile, *bias;                   // a thread: [panels][columns][rows of the panel], [columns]
    Element* weight;                      // a thread: [columns][depth_step]

    Work(const TargetLogprob& a, bool direct, Arena& arena) : dot(a.num_rows <= kDotRows), direct(direct) {
        depth = round_up(a.width, K::kUnit);
        const int64_t row_bytes = std::max<int64_t>(1, depth) * sizeof(Element);
        const int64_t most = std::clamp(kBlockBytes / row_bytes / kPanelRows, int64_t{1}, kBlockRows / kPanelRows);
        const int64_t num_blocks = divide_up(std::max<int64_t>(1, a.num_rows), most * kPanelRows);
        rows = round_up(divide_up(std::max<int64_t>(1, a.num_rows), num_blocks), K::kLanes);
        depth_step = dot && direct ? depth : kDepthBytes / sizeof(Element);
        slice_columns = round_up(divide_up(a.vocabulary, kSlices), K::kColumns);
        num_slices = divide_up(a.vocabulary, slice_columns);
        num_panels = divide_up(rows, kPanelRows);
        tile_size = kBlockColumns * rows;
        weight_size = direct ? 0 : kBlockColumns * depth_step;
        hidden = arena.take<Element>((dot ? kDotRows : rows) * depth);
        top = arena.take<float>(num_slices * rows);
        total = arena.take<float>(num_slices * rows);
        best = arena.take<int32_t>(num_slices * rows);
        argmax = arena.take<int32_t>(rows);
        first_target = arena.take<int32_t>(num_slices * num_panels);
        next_target = arena.take<int32_t>(a.num_targets);
        tile = arena.take<float>(a.num_threads * tile_size);
        bias = arena.take<float>(a.num_threads * kBlockColumns);
        weight = arena.take<Element>(a.num_threads * weight_size);
    }

    int vectors(int64_t panel) const {
        return static_cast<int>(std::min<int64_t>(K::kVectors, (rows - panel * kPanelRows) / K::kLanes));
    }
};

template <class K, int C>
auto* products_of(int vectors) {
    switch (vectors) {
        case 1:
            return &K::template products<C, 1>;
        case 2:
            return &K::template products<C, std::min(2, K::kVectors)>;
        case 3:
            return &K::template products<C, std::min(3, K::kVectors)>;
        default:
            return &K::template products<C, std::min(4, K::kVectors)>;
    }
}

template <class K, class Source>
struct Head {
    using Element = typename K::Element;

    const TargetLogprob& a;
    const Work<K>& w;

    const Source* hidden() const { return static_cast<const Source*>(a.hidden); }
    const Source* weight() const { return static_cast<const Source*>(a.weight); }

    Element hidden_at(int64_t row, int64_t k) const {
        if (row >= a.num_rows || k >= a.width) return 0;
        return convert<Element>(hidden()[row * a.hidden_stride[0] + k * a.hidden_stride[1]]);
    }

    void pack_hidden(int64_t first_row, int64_t panel) const {
        const int64_t num_rows = w.vectors(panel) * K::kLanes, row = first_row + panel * w.kPanelRows;
        Element* to = w.hidden + panel * w.kPanelRows * w.depth;
        for (int64_t k = 0; k < w.depth; k += K::kUnit) {
            for (int64_t r = 0; r < num_rows; ++r) {
                for (int64_t i = 0; i < K::kUnit; ++i) *to++ = hidden_at(row + r, k + i);
            }
        }
    }

    void pack_weight(int64_t column, int64_t columns, int64_t k, int64_t depth, Element* to) const {
        for (int64_t c = column; c < column + columns; ++c) {
            const Source* from = weight() + c * a.weight_stride[0] + k * a.weight_stride[1];
            const int64_t size = std::min(depth, a.width - k);
            for (int64_t i = 0; i < size; ++i) to[i] = convert<Element>(from[i * a.weight_stride[1]]);
            std::fill(to + size, to + depth, Element{0});
            to += depth;
        }
    }

    // Chains the block's targets by slice and panel, through next_target.
    void chain_targets(int64_t first_row) const {
        std::fill_n(w.first_target, w.num_slices * w.num_panels, -1);
        for (int64_t m = a.num_targets; m-- > 0;) {
            const int64_t row = a.row[m] - first_row;
            if (!in_block(m, first_row)) continue;
            int32_t& first = w.first_target[a.target[m] / w.slice_columns * w.num_panels + row / w.kPanelRows];
            w.next_target[m] = first;
            first = static_cast<int32_t>(m);
        }
    }

    bool in_block(int64_t m, int64_t first_row) const {
        const int64_t row = a.row[m], target = a.target[m];
        return row >= first_row && row < std::min(first_row + w.rows, a.num_rows) && target >= 0 &&
               target < a.vocabulary;
    }

    // Every row of the block against the columns of one slice.
    void slice(int64_t first_row, int64_t index) const {
        const int thread = omp_get_thread_num();
        float* tile = w.tile + thread * w.tile_size;
        float *top = w.top + index * w.rows, *total = w.total + index * w.rows;
        int32_t* best = w.best + index * w.rows;
        std::fill_n(top, w.rows, kLowest);
        std::fill_n(total, w.rows, 0.0f);
        std::fill_n(best, w.rows, 0);
        if (w.dot) std::fill_n(tile, w.tile_size, 0.0f);
        const int64_t last = std::min((index + 1) * w.slice_columns, a.vocabulary);
        for (int64_t column = index * w.slice_columns; column < last; column += kBlockColumns) {
            const int64_t columns = std::min(kBlockColumns, last - column);
            multiply(column, columns, tile, w.weight + thread * w.weight_size);
            float* bias = nullptr;
            if (a.bias != nullptr) {
                bias = w.bias + thread * kBlockColumns;
                for (int64_t c = 0; c < columns; ++c) {
                    bias[c] = to_float(static_cast<const Source*>(a.bias)[(column + c) * a.bias_stride]);
                }
            }
            for (int64_t panel = 0; panel < w.num_panels; ++panel) {
                const int64_t row = panel * w.kPanelRows;
                float* logits = tile + row * kBlockColumns;
                K::fold(logits, columns, w.vectors(panel), bias, a.scale, a.softcap, static_cast<int32_t>(column),
                        top + row, total + row, best + row);
                int32_t* link = w.first_target + index * w.num_panels + panel;
                while (*link >= 0) {
                    const int32_t m = *link;
                    const int64_t c = a.target[m] - column;
                    if (c < columns) {
                        a.logp[m] = logits[c * w.vectors(panel) * K::kLanes + a.row[m] - first_row - row];
                        *link = w.next_target[m];
                    } else {
                        link = w.next_target + m;
                    }
                }
            }
        }
    }

    void multiply(int64_t column, int64_t columns, float* tile, Element* packed) const {
        // No depth at all still makes logits: zeros.
        for (int64_t k = 0; k == 0 || k < w.depth; k += w.depth_step) {
            const int64_t depth = std::min(w.depth_step, w.depth - k);
            const Element* weights = packed;
            int64_t stride = depth;
            if (w.direct) {
                weights = static_cast<const Element*>(a.weight) + column * a.weight_stride[0] + k;
                stride = a.weight_stride[0];
            } else {
                pack_weight(column, columns, k, depth, packed);
            }
            if (w.dot) {
                for (int64_t c = 0; c < columns; ++c) {
                    for (int64_t r = 0; r < a.num_rows; ++r) {
                        const float product = K::product(weights + c * stride, w.hidden + r * w.depth + k, depth);
                        float& logit = tile[c * w.rows + r];
                        logit = k == 0 ? product : logit + product;
                    }
                }
                continue;
            }
            for (int64_t panel = 0; panel < w.num_panels; ++panel) {
                const int vectors = w.vectors(panel);
                const int64_t row = panel * w.kPanelRows, num_rows = vectors * K::kLanes;
                const Element* rows = w.hidden + row * w.depth + k * num_rows;
                const auto several = products_of<K, K::kColumns>(vectors), one = products_of<K, 1>(vectors);
                for (int64_t c = 0; c < columns;) {
                    const bool whole = columns - c >= K::kColumns;
                    (whole ? several : one)(weights + c * stride, stride, rows, depth / K::kUnit, k == 0,
                                            tile + row * kBlockColumns + c * num_rows);
                    c += whole ? K::kColumns : 1;
                }
            }
        }
    }

    void run() const {
        for (int64_t m = 0; m < a.num_targets; ++m) {
            a.logp[m] = std::numeric_limits<float>::quiet_NaN();
            a.is_argmax[m] = false;
        }
        for (int64_t first_row = 0; first_row < a.num_rows; first_row += w.rows) {
            chain_targets(first_row);
            const int64_t rows = std::min(w.rows, a.num_rows - first_row);
#pragma omp parallel num_threads(a.num_threads)
            {
#pragma omp for
                for (int64_t panel = 0; panel < (w.dot ? 0 : w.num_panels); ++panel) pack_hidden(first_row, panel);
                if (w.dot) {
#pragma omp for
                    for (int64_t r = 0; r < rows; ++r) {
                        for (int64_t k = 0; k < w.depth; ++k) w.hidden[r * w.depth + k] = hidden_at(r, k);
                    }
                }
#pragma omp for schedule(dynamic)
                for (int64_t index = 0; index < w.num_slices; ++index) slice(first_row, index);
#pragma omp for
                for (int64_t r = 0; r < w.rows; r += K::kLanes) {
                    K::merge(w.top + r, w.total + r, w.best + r, w.num_slices, w.rows, w.argmax + r);
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                // No logit above the lowest float means that there is none above -inf.
                const float log = std::log(w.total[r]);
                a.lse[first_row + r] =
                    w.top[r] == kLowest ? log - std::numeric_limits<float>::infinity() : w.top[r] + log;
            }
            for (int64_t m = 0; m < a.num_targets; ++m) {
                if (!in_block(m, first_row)) continue;
                a.is_argmax[m] = w.argmax[a.row[m] - first_row] == a.target[m] && !std::isnan(a.logp[m]);
                a.logp[m] -= a.lse[a.row[m]];
            }
        }
    }
};

template <class K, class Source>
int64_t run(const TargetLogprob& a, char* workspace) {
    using Element = typename K::Element;
    const bool direct = std::is_same_v<Element, Source> && a.weight_stride[1] == 1 && a.width % K::kUnit == 0;
    Arena arena{workspace};
    const Work<K> work(a, direct, arena);
    if (workspace != nullptr) Head<K, Source>{a, work}.run();
    return arena.used;
}

template <class K>
int64_t run(const TargetLogprob& a, char* workspace) {
    if constexpr (std::is_same_v<typename K::Element, float>) {
        if (!a.bfloat16) return run<K, float>(a, workspace);
    }
    return run<K, uint16_t>(a, workspace);
}

// The size of the workspace, and the result if there is one.
int64_t dispatch(const TargetLogprob& args, char* workspace) {
    TargetLogprob a = args;
    a.num_threads = static_cast<int>(std::clamp<int64_t>(a.num_threads, 1, kMaxThreads));
    const int best = best_isa();
    if (a.isa < kBestIsa || a.isa > best) {
        throw std::invalid_argument("isa: expected 0 to " + std::to_string(best) + ", which this processor has, got " +
                                    std::to_string(a.isa));
    }
    switch (a.isa == kBestIsa ? best : a.isa) {
#if defined(__x86_64__)
        case kAvx512Bf16:
            if (a.bfloat16) return run<Avx512Bf16>(a, workspace);
            [[fallthrough]];
        case kAvx512:
            return run<Avx512>(a, workspace);
        case kAvx2:
            return run<Avx2>(a, workspace);
#endif
        default:
            return run<Portable>(a, workspace);
    }
}

}  // namespace

int best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

int64_t target_logprob_workspace_bytes(const TargetLogprob& args) { return dispatch(args, nullptr); }

void target_logprob(const TargetLogprob& args) {
    const size_t size = static_cast<size_t>(target_logprob_workspace_bytes(args));
    const std::unique_ptr<char, decltype(&std::free)> workspace(
        static_cast<char*>(std::aligned_alloc(kCacheLine, size)), &std::free);
    if (workspace == nullptr) throw std::bad_alloc();
    dispatch(args, workspace.get());
}

}  // namespace icl
