// The gradients of target_logprob on the CPU, and target_logprob_sum. The vocabulary is taken a strip at a time: tiles
// of its logits are made, anew or once and for all, and become their own gradients, of which then each thread adds up
// products for weights and components of its own. So no sum depends on the threads.
#include "target_logprob.h"

namespace icl {
namespace {

constexpr int64_t kStripElements = 1 << 19;  // gradients of logits, or packed weights, that a core's cache holds ...
constexpr int64_t kLargestStrip = 2 << 20;   // ... and that are held all the same for kStripTiles ...
constexpr int64_t kStripTiles = 4;           // ... since each strip passes over all sums once
constexpr int64_t kComponents = 48;          // of hidden, whose gradients are one item: three cache lines of weights
constexpr int64_t kMostElements = int64_t{1} << 48;  // of hidden, lest sizes overflow
constexpr float kLowest = std::numeric_limits<float>::lowest();

// One call. As `hidden` has a component for each weight, so it has one that is always 1 for the bias. Online, the sums
// of exponentials are found along with the gradients, as attention finds them: all are taken below the highest logit
// so far, and rescaled where a strip has a higher one.
template <class K, class Source, bool kOnline>
class Gradients {
public:
    Gradients(const TargetLogprob& args, const TargetLogprobGradients& gradients, Arena& arena)
        : a(args), grad(gradients), depth(round_up(a.E, K::kUnit)) {
        direct = std::is_same_v<Element, Source> && a.weight_strides[1] == 1 && depth == a.E;
        rows = round_up(std::max<int64_t>(1, a.R), K::kLanes);
        row_panels = divide_up(rows, kPanel);
        components = grad.grad_weight == nullptr ? 0 : round_up(a.E + (grad.grad_bias != nullptr), K::kLanes);
        component_panels = divide_up(components, kPanel);
        const int64_t row_elements = std::max(rows, direct && !kPairs ? 1 : depth);
        const int64_t fitting = kStripElements / row_elements / kBlockColumns;
        const int64_t most = std::max<int64_t>(1, kLargestStrip / row_elements / kBlockColumns);
        strip_tiles = std::min({std::max(fitting, kStripTiles), most, divide_up(a.V, kBlockColumns)});
        const int64_t strip = strip_tiles * kBlockColumns;

        hidden = arena.take<Element>(rows * depth);
        hidden_across = arena.take<Element>(components * rows);
        sums = arena.take<float>(a.E * rows);
        lse = arena.take<float>(rows);
        share = arena.take<float>(rows);
        weight_along = arena.take<Element>(direct ? 0 : strip * depth);
        weight_across = kPairs ? arena.take<Element>(strip * a.E) : weight_along;
        slopes = arena.take<Element>(kOnline && kPairs ? 0 : strip * rows);
        slopes_across = kPairs ? arena.take<Element>(strip * rows) : slopes;
        if constexpr (kOnline) {
            logits = kPairs ? arena.take<float>(strip * rows) : reinterpret_cast<float*>(slopes);
            top = arena.take<float>(rows);
            total = arena.take<float>(rows);
            decay = arena.take<float>(rows);
            tile_top = arena.take<float>(strip_tiles * rows);
            tile_total = arena.take<float>(strip_tiles * rows);
            first_of_row = arena.take<int32_t>(rows);
            next_of_row = arena.take<int32_t>(a.M);
        }
        biases = arena.take<float>(strip);
        first_target = arena.take<int32_t>(strip_tiles * row_panels);
        next_target = arena.take<int32_t>(a.M);
        scratch = arena.take<float>(a.num_threads * kScratch);
    }

    void run() {
        if constexpr (kOnline) {
            run_online();
        } else {
            run_backward();
        }
    }

private:
    using Element = typename K::Element;
    static constexpr bool kPairs = K::kUnit == 2;
    static constexpr int64_t kPanel = K::kLanes * K::kVectors, kTile = kBlockColumns * kPanel;
    static constexpr int64_t kScratch = (kPairs ? 2 : 1) * kTile;

    void run_backward() {
        std::fill_n(lse, rows, kInfinity);  // of rows that are none: their slopes are 0
        std::fill_n(share, rows, 0.0f);
        std::copy_n(a.lse, a.R, lse);
        std::copy_n(grad.grad_lse, a.R, share);
        for (int64_t m = 0; m < a.M; ++m) share[a.row[m]] -= grad.grad_logp[m];
#pragma omp parallel num_threads(a.num_threads)
        {
#pragma omp for
            for (int64_t r = 0; r < rows; ++r) pack_row(r);
#pragma omp for
            for (int64_t i = 0; i < components; ++i) pack_component(i);
            for (int64_t column = 0; column < a.V; column += strip_tiles * kBlockColumns) {
                const int64_t columns = std::min(strip_tiles * kBlockColumns, a.V - column);
                const int64_t tiles = divide_up(columns, kBlockColumns);
                start_strip(column, columns);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < tiles * row_panels; ++i) descend(i / row_panels, i % row_panels);
                const int64_t items = divide_up(a.E, kComponents);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < items + tiles * component_panels; ++i) {
                    if (i < items) {
                        add_to_hidden(i * kComponents, tiles);
                    } else {
                        store_weights((i - items) / component_panels, (i - items) % component_panels);
                    }
                }
            }
#pragma omp for
            for (int64_t r = 0; r < a.R; ++r) {
                const int64_t panel = r / kPanel, lanes = vectors(rows, panel) * K::kLanes;
                K::round(sums + panel * kPanel * a.E + r % kPanel, lanes, a.E,
                         static_cast<Source*>(grad.grad_hidden) + r * a.E);
            }
        }
    }

    void run_online() {
        std::fill_n(a.logp, a.M, std::numeric_limits<float>::quiet_NaN());
        std::fill_n(top, rows, kLowest);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(share, rows, 0.0f);
        std::fill_n(first_of_row, rows, -1);
        for (int64_t m = a.M; m-- > 0;) {
            next_of_row[m] = first_of_row[a.row[m]];
            first_of_row[a.row[m]] = static_cast<int32_t>(m);
            share[a.row[m]] += grad.grad_logp[m];
        }
#pragma omp parallel num_threads(a.num_threads)
        {
#pragma omp for
            for (int64_t r = 0; r < rows; ++r) pack_row(r);
            for (int64_t column = 0; column < a.V; column += strip_tiles * kBlockColumns) {
                const int64_t columns = std::min(strip_tiles * kBlockColumns, a.V - column);
                const int64_t tiles = divide_up(columns, kBlockColumns);
                start_strip(column, columns);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < tiles * row_panels; ++i) rise(i / row_panels, i % row_panels);
#pragma omp for
                for (int64_t r = 0; r < rows; r += K::kLanes) {
                    K::settle(tile_top + r, tiles, rows, top + r, total + r, decay + r);
                }
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < tiles * row_panels; ++i) weigh(i / row_panels, i % row_panels);
                const int64_t items = divide_up(a.E, kComponents);
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i <= items; ++i) {
                    if (i < items) {
                        add_to_hidden(i * kComponents, tiles);
                    } else {
                        for (int64_t t = 0; t < tiles; ++t) {
                            for (int64_t r = 0; r < rows; ++r) total[r] += tile_total[t * rows + r];
                        }
                    }
                }
            }
#pragma omp for
            for (int64_t r = 0; r < a.R; ++r) finish_row(r);
        }
    }

    // What all threads do before the strip's tiles.
    void start_strip(int64_t column, int64_t columns) {
#pragma omp single
        {
            first_column = column;
            chain_targets();
            for (int64_t c = 0; a.bias != nullptr && c < columns; ++c) {
                biases[c] = to_float(static_cast<const Source*>(a.bias)[(column + c) * a.bias_stride]);
            }
        }
#pragma omp for
        for (int64_t c = 0; c < columns; c += 2) pack_weights(c, std::min<int64_t>(2, columns - c));
    }

    const TargetLogprob& a;
    const TargetLogprobGradients& grad;
    bool direct;  // weights are read where they are
    int64_t depth, rows, row_panels, components, component_panels, strip_tiles, first_column = 0;
    // A panel has lanes of [units][lanes][kUnit]: of the first two these are rows and components.
    Element *hidden, *hidden_across;
    float *sums, *lse, *share;              // [row panels][width][rows of the panel], [rows], [rows]
    Element *weight_along, *weight_across;  // of a strip: [columns][depth]; pairs of columns side by side
    Element *slopes, *slopes_across;      // of a strip: [tiles][row panels][columns][rows of the panel]; pairs likewise
    float* biases;                        // of a strip
    int32_t *first_target, *next_target;  // of a strip: [tiles][row panels], [M]
    float* scratch;                       // a thread's
    // Online: of a strip, laid out as slopes are, or the same memory; [rows]; of a strip, [tiles][rows]; [rows], [M].
    float *logits = nullptr, *top = nullptr, *total = nullptr, *decay = nullptr;
    float *tile_top = nullptr, *tile_total = nullptr;
    int32_t *first_of_row = nullptr, *next_of_row = nullptr;

    static int vectors(int64_t lanes, int64_t panel) {
        return static_cast<int>(std::min<int64_t>(K::kVectors, lanes / K::kLanes - panel * K::kVectors));
    }

    int64_t columns_of(int64_t tile) const {
        return std::min(kBlockColumns, a.V - first_column - tile * kBlockColumns);
    }

    int64_t slopes_at(int64_t tile, int64_t panel) const { return kBlockColumns * (tile * rows + panel * kPanel); }

    void pack_row(int64_t r) {
        const int64_t panel = r / kPanel;
        pack_lane<K>(static_cast<const Source*>(a.hidden) + r * a.hidden_strides[0], a.hidden_strides[1],
                     r < a.R ? a.E : 0, depth, vectors(rows, panel) * K::kLanes,
                     hidden + panel * kPanel * depth + r % kPanel * K::kUnit);
    }

    void pack_component(int64_t i) {
        const int64_t panel = i / kPanel;
        const Source one = nearest<Source>(1);
        const Source* from = i == a.E ? &one : static_cast<const Source*>(a.hidden) + i * a.hidden_strides[1];
        pack_lane<K>(from, i == a.E ? 0 : a.hidden_strides[0], i <= a.E ? a.R : 0, rows,
                     vectors(components, panel) * K::kLanes,
                     hidden_across + panel * kPanel * rows + i % kPanel * K::kUnit);
    }

    // Columns c and, if there is one, c + 1 of the strip.
    void pack_weights(int64_t c, int64_t count) {
        const int64_t stride = a.weight_strides[1];
        const Source* from = static_cast<const Source*>(a.weight) + (first_column + c) * a.weight_strides[0];
        for (int64_t i = 0; !direct && i < count; ++i) {
            pack_lane<K>(from + i * a.weight_strides[0], stride, a.E, depth, 1, weight_along + (c + i) * depth);
        }
        if constexpr (kPairs) {
            const Source* next = from + a.weight_strides[0];
            Element* to = weight_across + c * a.E;
            for (int64_t e = 0; e < a.E; ++e) {
                to[2 * e] = from[e * stride];
                to[2 * e + 1] = count == 2 ? next[e * stride] : 0;
            }
        }
    }

    void chain_targets() {
        std::fill_n(first_target, strip_tiles * row_panels, -1);
        for (int64_t m = 0; m < a.M; ++m) {
            const int64_t column = a.target[m] - first_column, tile = column / kBlockColumns;
            if (column < 0 || tile >= strip_tiles || a.target[m] >= a.V) continue;
            int32_t& first = first_target[tile * row_panels + a.row[m] / kPanel];
            next_target[m] = first;
            first = static_cast<int32_t>(m);
        }
    }

    // A tile's products of hidden and weight.
    void multiply_tile(int64_t tile, int64_t panel, float* products) {
        const int64_t column = tile * kBlockColumns, stride = direct ? a.weight_strides[0] : depth;
        const Element* weight = direct ? static_cast<const Element*>(a.weight) + (first_column + column) * stride
                                       : weight_along + column * stride;
        const int num_vectors = vectors(rows, panel);
        int64_t k = 0;
        do {
            const int64_t size = std::min(kDepth, depth - k);
            multiply<K>(weight + k, stride, columns_of(tile),
                        hidden + panel * kPanel * depth + k * num_vectors * K::kLanes, num_vectors, size / K::kUnit,
                        k == 0, products);
            k += size;
        } while (k < depth);
    }

    // Gradients of a tile's products.
    void descend(int64_t tile, int64_t panel) {
        const int64_t column = tile * kBlockColumns, columns = columns_of(tile), at = slopes_at(tile, panel);
        const int num_vectors = vectors(rows, panel);
        const int64_t lanes = num_vectors * K::kLanes;
        float* logits = scratch + omp_get_thread_num() * kScratch;
        float* tile_slopes;
        if constexpr (kPairs) {
            tile_slopes = logits + kTile;
        } else {
            tile_slopes = slopes + at;
        }
        multiply_tile(tile, panel, logits);
        K::descend(logits, columns, num_vectors, a.bias == nullptr ? nullptr : biases + column, a.scale, a.softcap,
                   lse + panel * kPanel, share + panel * kPanel, tile_slopes);
        for (int64_t m = first_target[tile * row_panels + panel]; m >= 0; m = next_target[m]) {
            const int64_t i = (a.target[m] - first_column - column) * lanes + a.row[m] - panel * kPanel;
            const float y = a.softcap == 0 ? 0 : logits[i] / a.softcap;
            tile_slopes[i] += grad.grad_logp[m] * a.scale * ((1 - y) * (1 + y));
        }
        if constexpr (kPairs) K::pair(tile_slopes, columns, num_vectors, slopes + at, slopes_across + at);
    }

    // A tile's logits, their maxima, and those of targets.
    void rise(int64_t tile, int64_t panel) {
        const int64_t column = tile * kBlockColumns, lanes = vectors(rows, panel) * K::kLanes;
        float* products = logits + slopes_at(tile, panel);
        multiply_tile(tile, panel, products);
        K::rise(products, columns_of(tile), vectors(rows, panel), a.bias == nullptr ? nullptr : biases + column,
                a.scale, a.softcap, tile_top + tile * rows + panel * kPanel);
        for (int64_t m = first_target[tile * row_panels + panel]; m >= 0; m = next_target[m]) {
            a.logp[m] = products[(a.target[m] - first_column - column) * lanes + a.row[m] - panel * kPanel];
        }
    }

    // A tile's slopes and their sums.
    void weigh(int64_t tile, int64_t panel) {
        const int64_t columns = columns_of(tile), at = slopes_at(tile, panel), row = panel * kPanel;
        float* found = kPairs ? scratch + omp_get_thread_num() * kScratch : logits + at;
        K::weigh(logits + at, columns, vectors(rows, panel), a.softcap, top + row, found,
                 tile_total + tile * rows + row);
        if constexpr (kPairs) {
            K::pair(found, columns, vectors(rows, panel), reinterpret_cast<Element*>(found + kTile),
                    slopes_across + at);
        }
    }

    // A row's log-probabilities and gradient, once all strips are added up.
    void finish_row(int64_t r) {
        const int64_t panel = r / kPanel, lanes = vectors(rows, panel) * K::kLanes;
        const float* sum = sums + panel * kPanel * a.E + r % kPanel;
        const float factor = -share[r] / total[r] * a.scale;
        float* gradient = static_cast<float*>(grad.grad_hidden) + r * a.E;
        for (int64_t e = 0; e < a.E; ++e) gradient[e] = factor * sum[e * lanes];
        // That no logit exceeds the lowest float means that all are -inf.
        const float row_lse = std::log(total[r]) + (top[r] == kLowest ? -kInfinity : top[r]);
        for (int64_t m = first_of_row[r]; m >= 0; m = next_of_row[m]) {
            const float y = a.softcap == 0 ? 0 : a.logp[m] / a.softcap;
            a.logp[m] -= row_lse;
            if (a.target[m] < 0 || a.target[m] >= a.V) continue;
            const float slope = grad.grad_logp[m] * a.scale * ((1 - y) * (1 + y));
            const Source* weight = static_cast<const Source*>(a.weight) + a.target[m] * a.weight_strides[0];
            for (int64_t e = 0; e < a.E; ++e) gradient[e] += slope * to_float(weight[e * a.weight_strides[1]]);
        }
    }

    void add_to_hidden(int64_t component, int64_t tiles) {
        const int64_t count = std::min(kComponents, a.E - component);
        for (int64_t r = 0; kOnline && first_column > 0 && r < rows; r += K::kLanes) {
            const int64_t panel = r / kPanel, lanes = vectors(rows, panel) * K::kLanes;
            K::rescale(sums + panel * kPanel * a.E + component * lanes + r % kPanel, count, lanes, decay + r);
        }
        const bool in_place = direct && !kPairs;
        const int64_t stride = in_place ? a.weight_strides[0] : a.E * K::kUnit;
        const Element* weight =
            in_place ? static_cast<const Element*>(a.weight) + first_column * stride : weight_across;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Element* factors = weight + tile * kBlockColumns / K::kUnit * stride + component * K::kUnit;
            for (int64_t panel = 0; panel < row_panels; ++panel) {
                const int num_vectors = vectors(rows, panel);
                multiply<K, true>(factors, stride, count, slopes_across + slopes_at(tile, panel), num_vectors,
                                  divide_up(columns_of(tile), K::kUnit), first_column == 0 && tile == 0,
                                  sums + panel * kPanel * a.E + component * num_vectors * K::kLanes);
            }
        }
    }

    void store_weights(int64_t tile, int64_t panel) {
        const int num_vectors = vectors(components, panel);
        const int64_t columns = columns_of(tile), lanes = num_vectors * K::kLanes;
        const Element* factors = hidden_across + panel * kPanel * rows;
        float* products = scratch + omp_get_thread_num() * kScratch;
        for (int64_t p = 0; p < row_panels; ++p) {
            const int64_t size = vectors(rows, p) * K::kLanes;
            multiply<K>(slopes + slopes_at(tile, p), size, columns, factors + p * kPanel * lanes, num_vectors,
                        size / K::kUnit, p == 0, products);
        }
        const int64_t size = std::min(lanes, a.E - panel * kPanel);
        for (int64_t c = 0; c < columns; ++c, products += lanes) {
            const int64_t column = first_column + tile * kBlockColumns + c;
            K::round(products, 1, size, static_cast<Source*>(grad.grad_weight) + column * a.E + panel * kPanel);
            if (grad.grad_bias != nullptr && panel == a.E / kPanel) {
                K::round(products + a.E % kPanel, 1, 1, static_cast<Source*>(grad.grad_bias) + column);
            }
        }
    }
};

// The size of the workspace, and the result if there is one.
template <bool kOnline>
int64_t dispatch(const TargetLogprob& args, const TargetLogprobGradients& gradients, char* workspace) {
    require_sizes(args);
    require_range("elements of hidden", args.R * args.E, 0, kMostElements);
    TargetLogprob a = args;
    a.num_threads = static_cast<int>(std::clamp<int64_t>(a.num_threads, 1, kMaxThreads));
    for (int64_t m = 0; workspace != nullptr && m < a.M; ++m) {
        require_range("row", a.row[m], 0, a.R - 1);
    }
    return choose_kernel(a, [&](auto kernel, auto source) {
        Arena arena{workspace};
        Gradients<decltype(kernel), decltype(source), kOnline> call(a, gradients, arena);
        if (workspace != nullptr) call.run();
        return arena.used;
    });
}

}  // namespace

int64_t target_logprob_backward_workspace_bytes(const TargetLogprob& args) {
    static char all;  // gradients are asked for; where they go is not read
    return dispatch<false>(args, {nullptr, nullptr, &all, &all, &all}, nullptr);
}

void target_logprob_backward(const TargetLogprob& args, const TargetLogprobGradients& gradients) {
    run_in_workspace([&](char* workspace) { return dispatch<false>(args, gradients, workspace); });
}

int64_t target_logprob_sum_workspace_bytes(const TargetLogprob& args) { return dispatch<true>(args, {}, nullptr); }

void target_logprob_sum(const TargetLogprob& args, const float* target_weight, float* grad_hidden) {
    const TargetLogprobGradients gradients{target_weight, nullptr, grad_hidden, nullptr, nullptr};
    run_in_workspace([&](char* workspace) { return dispatch<true>(args, gradients, workspace); });
}

}  // namespace icl
