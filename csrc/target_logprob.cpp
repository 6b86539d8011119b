// The output head fused with its softmax: blocks of logits are made, folded into each row's maximum and sum of
// exponentials, and overwritten while they are still in the cache.
#include "target_logprob.h"

namespace icl {
namespace {

constexpr int64_t kSlices = 64;           // parts of the vocabulary that threads take turns at, summed up in order
constexpr int64_t kSliceColumns = 24;     // divides their sizes: whole groups of columns, whatever the kernel
constexpr int64_t kBlockRows = 512;       // rows that share a pass over the weights ...
constexpr int64_t kBlockBytes = 4 << 20;  // ... fewer where they are so wide that they would take more than this
constexpr int64_t kDotRows = 4;           // up to so many rows are not worth packing into lanes, if bits may differ
constexpr int64_t kPackedDepth = 256;     // of kDepth, where the weights are packed first
constexpr float kLowest = std::numeric_limits<float>::lowest();

// One call. How it is cut up depends on the shapes alone, never on the threads, and so do the bits of its results.
template <class K, class Source>
class Head {
public:
    Head(const TargetLogprob& args, Arena& arena)
        : a(args), dot(a.R <= kDotRows && !a.batch_invariant), depth(round_up(a.E, K::kUnit)) {
        direct = std::is_same_v<Element, Source> && a.weight_strides[1] == 1 && depth == a.E;
        depth_step = std::max<int64_t>(K::kUnit, direct ? std::min(depth, kDepth) : std::min(depth, kPackedDepth));
        const int64_t row_bytes = std::max<int64_t>(1, depth) * sizeof(Element);
        const int64_t panels = std::clamp(kBlockBytes / row_bytes / kPanelRows, int64_t{1}, kBlockRows / kPanelRows);
        const int64_t blocks = divide_up(std::max<int64_t>(1, a.R), panels * kPanelRows);
        rows = round_up(divide_up(std::max<int64_t>(1, a.R), blocks), K::kLanes);
        num_panels = divide_up(rows, kPanelRows);
        slice_columns = round_up(divide_up(a.V, kSlices), kSliceColumns);
        num_slices = divide_up(a.V, slice_columns);
        tile_size = kBlockColumns * (depth > depth_step ? rows : std::min(rows, kPanelRows));
        weight_size = direct ? 0 : kBlockColumns * depth_step;

        hidden = arena.take<Element>((dot ? kDotRows : rows) * depth);
        top = arena.take<float>(num_slices * rows);
        total = arena.take<float>(num_slices * rows);
        best = arena.take<int32_t>(num_slices * rows);
        argmax = arena.take<int32_t>(rows);
        first_target = arena.take<int32_t>(num_slices * num_panels);
        next_target = arena.take<int32_t>(a.M);
        tiles = arena.take<float>(a.num_threads * tile_size);
        biases = arena.take<float>(a.num_threads * kBlockColumns);
        weights = arena.take<Element>(a.num_threads * weight_size);
    }

    void run() {
        std::fill_n(a.logp, a.M, std::numeric_limits<float>::quiet_NaN());
        std::fill_n(a.is_argmax, a.M, false);
        for (first_row = 0; first_row < a.R; first_row += rows) {
            const int64_t num_rows = std::min(rows, a.R - first_row);
            chain_targets();
#pragma omp parallel num_threads(a.num_threads)
            {
#pragma omp for
                for (int64_t r = 0; r < (dot ? num_rows : rows); ++r) pack_row(r);
#pragma omp for schedule(dynamic)
                for (int64_t index = 0; index < num_slices; ++index) slice(index);
#pragma omp for
                for (int64_t r = 0; r < rows; r += K::kLanes) {
                    K::merge(top + r, total + r, best + r, num_slices, rows, argmax + r);
                }
            }
            for (int64_t r = 0; r < num_rows; ++r) {
                // That no logit exceeds the lowest float means that all are -inf.
                a.lse[first_row + r] = std::log(total[r]) + (top[r] == kLowest ? -kInfinity : top[r]);
            }
            for (int64_t m = 0; m < a.M; ++m) {
                if (!in_block(m)) continue;
                a.is_argmax[m] = argmax[a.row[m] - first_row] == a.target[m] && !std::isnan(a.logp[m]);
                a.logp[m] -= a.lse[a.row[m]];
            }
        }
    }

private:
    using Element = typename K::Element;
    static constexpr int64_t kPanelRows = K::kLanes * K::kVectors;

    const TargetLogprob& a;
    bool dot, direct;  // rows are multiplied one at a time; weights are read where they are
    int64_t rows, first_row = 0, depth, depth_step, slice_columns, num_slices, num_panels, tile_size, weight_size;
    Element* hidden;                      // [panels][units][rows of the panel][kUnit], or [rows][depth] to dot
    float *top, *total;                   // [slices][rows]
    int32_t *best, *argmax;               // [slices][rows], [rows]
    int32_t *first_target, *next_target;  // [slices][panels], [M]: which targets to look up where, chained
    float *tiles, *biases;  // a thread's: [panels][columns][rows of the panel] or, where one will do, one; [columns]
    Element* weights;       // a thread's: [columns][depth_step]

    int vectors(int64_t panel) const {
        return static_cast<int>(std::min<int64_t>(K::kVectors, (rows - panel * kPanelRows) / K::kLanes));
    }

    bool in_block(int64_t m) const {
        const int64_t row = a.row[m], target = a.target[m];
        return row >= first_row && row < std::min(first_row + rows, a.R) && target >= 0 && target < a.V;
    }

    void chain_targets() {
        std::fill_n(first_target, num_slices * num_panels, -1);
        for (int64_t m = 0; m < a.M; ++m) {
            if (!in_block(m)) continue;
            const int64_t panel = (a.row[m] - first_row) / kPanelRows;
            int32_t& first = first_target[a.target[m] / slice_columns * num_panels + panel];
            next_target[m] = first;
            first = static_cast<int32_t>(m);
        }
    }

    void pack_row(int64_t r) {
        const int64_t panel = r / kPanelRows, size = first_row + r < a.R ? a.E : 0;
        const Source* from = static_cast<const Source*>(a.hidden) + (first_row + r) * a.hidden_strides[0];
        Element* to = hidden + (dot ? r * depth : panel * kPanelRows * depth + r % kPanelRows * K::kUnit);
        pack_lane<K>(from, a.hidden_strides[1], size, depth, dot ? 1 : vectors(panel) * K::kLanes, to);
    }

    void pack_weight(int64_t column, int64_t columns, int64_t k, int64_t size, Element* to) const {
        const int64_t filled = std::min(size, a.E - k);
        for (int64_t c = column; c < column + columns; ++c, to += size) {
            const Source* from =
                static_cast<const Source*>(a.weight) + c * a.weight_strides[0] + k * a.weight_strides[1];
            for (int64_t i = 0; i < filled; ++i) to[i] = convert<Element>(from[i * a.weight_strides[1]]);
            std::fill(to + filled, to + size, Element{0});
        }
    }

    // All rows of the block against one slice of the vocabulary.
    void slice(int64_t index) {
        const int64_t thread = omp_get_thread_num();
        float *tile = tiles + thread * tile_size, *bias = a.bias == nullptr ? nullptr : biases + thread * kBlockColumns;
        std::fill_n(top + index * rows, rows, kLowest);
        std::fill_n(total + index * rows, rows, 0.0f);
        std::fill_n(best + index * rows, rows, 0);
        if (dot) std::fill_n(tile, tile_size, 0.0f);
        const int64_t last = std::min((index + 1) * slice_columns, a.V);
        for (int64_t column = index * slice_columns; column < last; column += kBlockColumns) {
            const int64_t columns = std::min(kBlockColumns, last - column);
            for (int64_t c = 0; bias != nullptr && c < columns; ++c) {
                bias[c] = to_float(static_cast<const Source*>(a.bias)[(column + c) * a.bias_stride]);
            }
            int64_t k = 0;
            do {
                const int64_t size = std::min(depth_step, depth - k);
                const Element* weight = weights + thread * weight_size;
                if (direct) {
                    weight = static_cast<const Element*>(a.weight) + column * a.weight_strides[0] + k;
                } else {
                    pack_weight(column, columns, k, size, weights + thread * weight_size);
                }
                const int64_t stride = direct ? a.weight_strides[0] : size;
                for (int64_t panel = 0; panel < num_panels; ++panel) {
                    float* logits = depth > depth_step ? tile + panel * kPanelRows * kBlockColumns : tile;
                    multiply(weight, stride, columns, panel, k, size, logits);
                    if (k + size < depth) continue;
                    const int64_t at = index * rows + panel * kPanelRows;
                    K::fold(logits, columns, vectors(panel), bias, a.scale, a.softcap, static_cast<int32_t>(column),
                            top + at, total + at, best + at);
                    pick(logits, column, columns, panel, first_target + index * num_panels + panel);
                }
                k += size;
            } while (k < depth);
        }
    }

    // Elements k to k + size of the products of a panel's rows with a block of columns, added to those before.
    void multiply(const Element* weight, int64_t stride, int64_t columns, int64_t panel, int64_t k, int64_t size,
                  float* tile) const {
        const int64_t lanes = vectors(panel) * K::kLanes;
        if (dot) {
            for (int64_t c = 0; c < columns; ++c) {
                for (int64_t r = 0; r < a.R; ++r) {
                    const float product = K::product(weight + c * stride, hidden + r * depth + k, size);
                    tile[c * lanes + r] = (k == 0 ? 0 : tile[c * lanes + r]) + product;
                }
            }
            return;
        }
        icl::multiply<K>(weight, stride, columns, hidden + panel * kPanelRows * depth + k * lanes, vectors(panel),
                         size / K::kUnit, k == 0, tile);
    }

    void pick(const float* tile, int64_t column, int64_t columns, int64_t panel, int32_t* link) {
        const int64_t lanes = vectors(panel) * K::kLanes, row = first_row + panel * kPanelRows;
        while (*link >= 0) {
            const int32_t m = *link;
            const int64_t c = a.target[m] - column;
            if (c < columns) {
                a.logp[m] = tile[c * lanes + a.row[m] - row];
                *link = next_target[m];  // what is left is in later blocks
            } else {
                link = next_target + m;
            }
        }
    }
};

template <class K, class Source>
int64_t run(const TargetLogprob& a, char* workspace) {
    Arena arena{workspace};
    Head<K, Source> head(a, arena);
    if (workspace != nullptr) head.run();
    return arena.used;
}

// The size of the workspace, and the result if there is one.
int64_t dispatch(const TargetLogprob& args, char* workspace) {
    require_sizes(args);
    TargetLogprob a = args;
    a.num_threads = static_cast<int>(std::clamp<int64_t>(a.num_threads, 1, kMaxThreads));
    return choose_kernel(
        a, [&](auto kernel, auto source) { return run<decltype(kernel), decltype(source)>(a, workspace); });
}

}  // namespace

int64_t target_logprob_workspace_bytes(const TargetLogprob& args) { return dispatch(args, nullptr); }

void target_logprob(const TargetLogprob& args) {
    run_in_workspace([&](char* workspace) { return dispatch(args, workspace); });
}

}  // namespace icl
