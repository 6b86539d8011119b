// Coverage-guided fuzzing of the native API (csrc/icl.h) under AddressSanitizer and UBSan: `make sanitize`.
//
// An input is read as arguments of one function: mostly sound ones, of sizes around those of the kernels' tiles, some
// of them hostile. Each array is a heap block of exactly the elements that its sizes and strides reach, so that one
// element too far ends the run; so does a result that cannot be. What is refused must be std::invalid_argument.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#include "../csrc/icl.h"

namespace {

void require(bool holds) {
    if (!holds) std::abort();
}

// One input in 16 has this fault: a value that no caller should give.
int64_t hostile(FuzzedDataProvider& data, int64_t sound) {
    constexpr int64_t kValues[] = {-1, 0, 1, INT32_MAX, int64_t{INT32_MAX} + 1, INT64_MAX, INT64_MIN};
    return data.ConsumeIntegralInRange(0, 15) ? sound : data.PickValueInArray(kValues);
}

// A heap block of its own, without the slack that a vector has.
template <class T>
struct Block {
    int64_t size;
    std::unique_ptr<T[]> at;

    explicit Block(int64_t size) : size(size), at(new T[size]()) {}
};

// Indices: any integers, most of them near those in range.
Block<int32_t> indices(FuzzedDataProvider& data, int64_t size, int32_t most, int32_t least = -1) {
    Block<int32_t> block(size);
    const bool any = data.ConsumeIntegralInRange(0, 7) == 0;
    for (int64_t i = 0; i < size; ++i) {
        block.at[i] = any ? data.ConsumeIntegral<int32_t>() : data.ConsumeIntegralInRange(least, most + 1);
    }
    return block;
}

// The i-th of floats, or of bfloat16.
float number(const char* from, int64_t i, bool bfloat16) {
    float value = 0;
    std::memcpy(reinterpret_cast<char*>(&value) + (bfloat16 ? 2 : 0), from + i * (bfloat16 ? 2 : 4), bfloat16 ? 2 : 4);
    return value;
}

// Elements of N dimensions with strides of their own, within [-1, 1] or, if `wild`, any bits of a float.
template <int N>
struct Tensor {
    bool bfloat16;
    std::array<int64_t, N> strides;
    Block<char> bytes{0};

    Tensor(FuzzedDataProvider& data, bool bfloat16, std::array<int64_t, N> shape, bool wild) : bfloat16(bfloat16) {
        int64_t reach = 1, packed = 1;
        std::array<int, N> order{};
        for (int i = 0; i < N; ++i) order[i] = i;
        if (data.ConsumeBool()) std::reverse(order.begin(), order.end());
        for (int n = N - 1; n >= 0; --n) {
            const int i = order[n];
            const int64_t gap = data.ConsumeIntegralInRange(0, 9);
            strides[i] = gap == 0 ? 0 : packed + (gap == 1 ? data.ConsumeIntegralInRange(1, 3) : 0);
            if (shape[i] <= 1) strides[i] = 1;
            if (shape[i] > 0) reach += (shape[i] - 1) * strides[i];
            packed = std::max<int64_t>(1, strides[i] * shape[i]);
        }
        for (const int64_t size : shape) reach = size == 0 ? 0 : reach;
        bytes = Block<char>(reach * (bfloat16 ? 2 : 4));
        // Few numbers of the input, repeated: it would else be used up before the options are read.
        std::array<float, 8> values{};
        for (float& value : values) {
            value = data.ConsumeIntegral<int8_t>() / 128.0f;
            if (const uint32_t bits = wild ? data.ConsumeIntegral<uint32_t>() : 0) std::memcpy(&value, &bits, 4);
        }
        for (int64_t i = 0; i < reach; ++i) {
            const char* value = reinterpret_cast<const char*>(&values[(i * 5 + i / 8) % 8]);
            std::memcpy(bytes.at.get() + i * (bfloat16 ? 2 : 4), value + (bfloat16 ? 2 : 0), bfloat16 ? 2 : 4);
        }
    }

    double operator()(std::array<int64_t, N> where) const {
        int64_t i = 0;
        for (int n = 0; n < N; ++n) i += where[n] * strides[n];
        return number(bytes.at.get(), i, bfloat16);
    }
};

void fuzz_trie(FuzzedDataProvider& data) {
    const int64_t num_requests = data.ConsumeIntegralInRange(0, 12);
    std::vector<int64_t> offsets{0}, context;
    std::vector<int32_t> all;
    const int32_t letters = data.ConsumeBool() ? 2 : INT32_MAX;
    for (int64_t r = 0; r < num_requests; ++r) {
        const int64_t copied = r ? data.ConsumeIntegralInRange<int64_t>(0, offsets[r] - offsets[r - 1]) : 0;
        const int64_t added = data.ConsumeIntegralInRange(copied > 1 ? 0 : 2, 9);
        for (int64_t i = 0; i < copied; ++i) all.push_back(all[offsets[r - 1] + i]);
        for (int64_t i = 0; i < added; ++i) all.push_back(data.ConsumeIntegralInRange(0, letters));
        context.push_back(data.ConsumeIntegralInRange<int64_t>(1, copied + added - 1));
        offsets.push_back(static_cast<int64_t>(all.size()));
    }
    if (data.ConsumeBool()) {
        auto& spoilt = data.ConsumeBool() && num_requests ? context : offsets;
        int64_t& value = spoilt[data.ConsumeIntegralInRange<size_t>(0, spoilt.size() - 1)];
        value = hostile(data, value + data.ConsumeIntegralInRange(-2, 2));
        if (!all.empty())
            all[data.ConsumeIntegralInRange<size_t>(0, all.size() - 1)] -= data.ConsumeIntegralInRange(0, 2);
    }
    // The same requests with some of their first tokens said once, as a head that several of them name.
    const bool split = data.ConsumeBool() && num_requests > 0;
    std::vector<int64_t> head_offsets{0}, tail_offsets{0};
    std::vector<int32_t> heads, tails, head;
    for (int64_t r = 0; r < num_requests; ++r) {
        const bool sound = r + 1 < static_cast<int64_t>(offsets.size()) && offsets[r] >= 0 &&
                           offsets[r + 1] >= offsets[r] && offsets[r + 1] <= static_cast<int64_t>(all.size());
        if (split && !sound) throw std::invalid_argument("offsets");
        if (!split) break;
        const int64_t length = offsets[r + 1] - offsets[r], cut = data.ConsumeIntegralInRange<int64_t>(0, length);
        const auto first = all.begin() + offsets[r];
        int32_t found = -1;
        for (size_t h = 0; h + 1 < head_offsets.size(); ++h) {
            if (head_offsets[h + 1] - head_offsets[h] == cut &&
                std::equal(first, first + cut, heads.begin() + head_offsets[h]))
                found = h;
        }
        if (found < 0 || data.ConsumeIntegralInRange(0, 3) == 0) {
            found = static_cast<int32_t>(head_offsets.size()) - 1;
            heads.insert(heads.end(), first, first + cut);
            head_offsets.push_back(heads.size());
        }
        head.push_back(found);
        tails.insert(tails.end(), first + cut, first + length);
        tail_offsets.push_back(tails.size());
    }
    const std::vector<int32_t> sound_head = head;
    const std::vector<int64_t> sound_offsets = head_offsets;
    if (split && data.ConsumeIntegralInRange(0, 7) == 0) head[0] = static_cast<int32_t>(hostile(data, head[0]));
    if (split && data.ConsumeIntegralInRange(0, 7) == 0) head_offsets.back() = hostile(data, head_offsets.back());
    const std::vector<int32_t>& given = split ? tails : all;
    Block<int32_t> tokens(static_cast<int64_t>(given.size())), head_tokens(static_cast<int64_t>(heads.size()));
    std::copy(given.begin(), given.end(), tokens.at.get());
    std::copy(heads.begin(), heads.end(), head_tokens.at.get());
    const icl::Requests requests{
        {tokens.at.get(), tokens.size, (split ? tail_offsets : offsets).data(), num_requests},
        context.data(),
        {head_tokens.at.get(), head_tokens.size, head_offsets.data(), static_cast<int64_t>(head_offsets.size()) - 1},
        split ? head.data() : nullptr,
        data.ConsumeBool()};
    const auto sorted = icl::trie_sort(requests);
    const icl::TrieSizes sizes = icl::trie_sizes(sorted, requests.whole);
    std::vector<Block<int32_t>> made;
    for (const int64_t size : {sizes.nodes, sizes.nodes, sizes.nodes, sizes.nodes, sizes.rows, sizes.rows, sizes.rows,
                               sizes.rows, sizes.rows, sizes.scored, sizes.scored, sizes.path, num_requests}) {
        made.emplace_back(size);
    }
    Block<int64_t> path_offset(num_requests + 1);
    const auto at = [&](int i) { return made[i].at.get(); };
    const icl::TrieArrays out{
        at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), path_offset.at.get(),
        at(12)};
    icl::trie_fill(requests, sorted, sizes, out);

    if (head != sound_head || head_offsets != sound_offsets) return;  // another request than `all` has
    std::set<std::vector<int32_t>> prefixes;
    for (int64_t r = 0; r < num_requests; ++r) {
        const auto first = all.begin() + offsets[r];
        for (int64_t n = 1; n <= offsets[r + 1] - offsets[r]; ++n) prefixes.emplace(first, first + n);
        const int64_t last = offsets[r + 1] - offsets[r] - (requests.whole ? 1 : 2);
        require(out.token[out.last_row[r]] == first[last] && out.depth[out.last_row[r]] == last);
        require(out.path_offset[r + 1] - out.path_offset[r] == offsets[r + 1] - offsets[r] - context[r]);
        for (int64_t i = context[r]; i < offsets[r + 1] - offsets[r]; ++i) {
            const int32_t node = out.path[out.path_offset[r] + i - context[r]];
            require(out.scored_token[node] == first[i] && first[i] >= 0);
            const int32_t row = out.scored_row[node];
            require(out.token[row] == first[i - 1] && out.depth[row] == i - 1);
            Block<int32_t> ancestors(i - 1);
            icl::trie_ancestors(out.parent, sizes.rows, row, ancestors.at.get(), ancestors.size);
            for (int64_t j = 0; j < i - 1; ++j) require(out.token[ancestors.at[j]] == first[j]);
        }
    }
    require(static_cast<int64_t>(prefixes.size()) == sizes.nodes);
}

void fuzz_ancestors(FuzzedDataProvider& data) {
    const int64_t rows = data.ConsumeIntegralInRange(0, 9), size = data.ConsumeIntegralInRange(0, 9);
    const Block<int32_t> parent = indices(data, rows, static_cast<int32_t>(rows));
    Block<int32_t> out(size);
    icl::trie_ancestors(parent.at.get(), rows, hostile(data, data.ConsumeIntegralInRange<int64_t>(-1, rows)),
                        out.at.get(), size);
}

void fuzz_attention(FuzzedDataProvider& data) {
    constexpr int64_t kComponents[] = {0, 1, 2, 3, 16, 33};
    const int64_t T = data.ConsumeIntegralInRange(0, 70), S = data.ConsumeIntegralInRange(0, 110);
    const int64_t G = data.ConsumeIntegralInRange(1, 3), H = G * data.ConsumeIntegralInRange(0, 3);
    const int64_t D = data.PickValueInArray(kComponents), Dv = data.PickValueInArray(kComponents);
    icl::TrieAttention a{};
    a.bfloat16 = data.ConsumeBool();
    const bool wild = data.ConsumeIntegralInRange(0, 3) == 0;
    const Tensor<3> q(data, a.bfloat16, {T, H, D}, wild), k(data, a.bfloat16, {S, G, D}, wild),
        v(data, a.bfloat16, {S, G, Dv}, wild);
    const auto most = static_cast<int32_t>(S);
    const auto row_q = indices(data, T, most), end_k = indices(data, S, most);
    const auto depth_q = indices(data, T, most, 0), depth_k = indices(data, S, most, 0);
    Block<float> sinks(H), lse(T * H);
    Block<char> out(T * H * Dv * (a.bfloat16 ? 2 : 4));
    for (int64_t h = 0; h < H; ++h) sinks.at[h] = data.ConsumeIntegral<int8_t>() / 16.0f;
    a.T = hostile(data, T), a.S = S, a.H = hostile(data, H), a.G = G, a.D = D, a.Dv = Dv;
    a.q = q.bytes.at.get(), a.k = k.bytes.at.get(), a.v = v.bytes.at.get();
    std::copy(q.strides.begin(), q.strides.end(), a.q_strides);
    std::copy(k.strides.begin(), k.strides.end(), a.k_strides);
    std::copy(v.strides.begin(), v.strides.end(), a.v_strides);
    a.row_q = row_q.at.get(), a.end_k = end_k.at.get(), a.depth_q = depth_q.at.get(), a.depth_k = depth_k.at.get();
    a.sinks = data.ConsumeBool() ? sinks.at.get() : nullptr;
    a.scale = wild ? data.ConsumeFloatingPoint<float>() : data.ConsumeIntegral<int8_t>() / 64.0f;
    a.softcap = data.ConsumeBool() ? 0 : wild ? std::abs(data.ConsumeFloatingPoint<float>()) : 2;
    a.window = data.ConsumeBool() ? 0 : wild ? data.ConsumeIntegral<int32_t>() : 5;
    a.isa = data.ConsumeIntegralInRange(0, icl::best_isa());
    a.batch_invariant = data.ConsumeBool();
    a.out = out.at.get();
    a.lse = lse.at.get();
    if (a.T > T || a.H > H) {  // only sizes that must be refused may be larger than the arrays
        if (a.T <= icl::kMaxIndex && a.H <= icl::kMaxIndex && a.H % G == 0) return;
    }
    icl::trie_attention(a);
    for (int64_t t = 0; !wild && t < a.T; t += 1 + a.T / 8) {  // some queries: the definition is slow
        for (int64_t h = 0; h < a.H; ++h) {
            const int64_t g = h / (a.H / G);
            std::vector<double> mean(Dv);
            double total = a.sinks == nullptr ? 0 : std::exp(sinks.at[h]);
            for (int64_t s = 0; s < S; ++s) {
                const int64_t distance = int64_t{depth_q.at[t]} - depth_k.at[s];
                if (s > row_q.at[t] || row_q.at[t] >= end_k.at[s] || (a.window && distance >= a.window)) continue;
                double score = 0;
                for (int64_t d = 0; d < D; ++d) score += q({t, h, d}) * k({s, g, d});
                score *= a.scale;
                const double weight = std::exp(a.softcap ? a.softcap * std::tanh(score / a.softcap) : score);
                total += weight;
                for (int64_t d = 0; d < Dv; ++d) mean[d] += weight * v({s, g, d});
            }
            for (int64_t d = 0; d < Dv; ++d) {
                const double expected = total == 0 ? 0 : mean[d] / total;
                const double got = number(out.at.get(), (t * a.H + h) * Dv + d, a.bfloat16);
                require(std::abs(got - expected) <= (a.bfloat16 ? 3e-2 : 1e-3));
            }
        }
    }
}

void fuzz_head(FuzzedDataProvider& data) {
    const int64_t R = data.ConsumeIntegralInRange(0, 70), V = data.ConsumeIntegralInRange(1, 220);
    const int64_t E = data.ConsumeIntegralInRange(0, data.ConsumeBool() ? 40 : 600);
    const int64_t M = data.ConsumeIntegralInRange(0, 20);
    icl::TargetLogprob a{};
    a.bfloat16 = data.ConsumeBool();
    const bool wild = data.ConsumeIntegralInRange(0, 3) == 0;
    const Tensor<2> hidden(data, a.bfloat16, {R, E}, wild), weight(data, a.bfloat16, {V, E}, wild);
    const Tensor<1> bias(data, a.bfloat16, {V}, wild);
    auto row = indices(data, M, static_cast<int32_t>(R)), target = indices(data, M, static_cast<int32_t>(V));
    Block<float> logp(M), lse(R);
    Block<bool> is_argmax(M);
    a.hidden = hidden.bytes.at.get(), a.weight = weight.bytes.at.get();
    std::copy(hidden.strides.begin(), hidden.strides.end(), a.hidden_strides);
    std::copy(weight.strides.begin(), weight.strides.end(), a.weight_strides);
    a.bias = data.ConsumeBool() ? bias.bytes.at.get() : nullptr;
    a.bias_stride = bias.strides[0];
    a.R = R, a.E = E, a.V = V, a.M = M;
    int64_t* const sizes[] = {&a.R, &a.E, &a.V, &a.M};
    int64_t& size = *data.PickValueInArray(sizes);
    const int64_t given = hostile(data, size);
    if (given < 0 || given > icl::kMaxIndex || given <= size) size = given;
    a.row = row.at.get(), a.target = target.at.get();
    a.scale = wild ? data.ConsumeFloatingPoint<float>() : 0.5f;
    a.softcap = data.ConsumeBool() ? 0 : wild ? std::abs(data.ConsumeFloatingPoint<float>()) : 3;
    a.isa = data.ConsumeIntegralInRange(0, icl::best_isa());
    a.num_threads = data.ConsumeIntegral<int32_t>();
    a.batch_invariant = data.ConsumeBool();
    a.logp = logp.at.get(), a.is_argmax = is_argmax.at.get(), a.lse = lse.at.get();
    require(icl::target_logprob_workspace_bytes(a) > 0);
    icl::target_logprob(a);
    for (int64_t m = 0; m < a.M; ++m) {
        const int32_t r = row.at[m], t = target.at[m];
        const bool inside = r >= 0 && r < a.R && t >= 0 && t < a.V;
        if (!inside) require(std::isnan(logp.at[m]) && !is_argmax.at[m]);
        if (inside && !wild) require(logp.at[m] <= 1e-3f);
    }
    const int64_t bytes = a.bfloat16 ? 2 : 4;
    Block<float> grad_logp(M), grad_lse(R);
    Block<char> grad_hidden(R * E * bytes), grad_weight(V * E * bytes), grad_bias(V * bytes);
    for (int64_t m = 0; m < M; ++m) grad_logp.at[m] = data.ConsumeIntegral<int8_t>() / 128.0f;
    for (int64_t r = 0; r < R; ++r) grad_lse.at[r] = r % 3 / 4.0f;
    for (int64_t r = 0; wild && r < R; ++r) lse.at[r] = data.ConsumeFloatingPoint<float>();
    for (int64_t m = 0; a.R > 0 && m < M; ++m) {  // the backward refuses others: some inputs keep them
        if (data.ConsumeIntegralInRange(0, 63)) row.at[m] = std::clamp<int64_t>(row.at[m], 0, a.R - 1);
    }
    const bool need_weight = data.ConsumeBool();
    require(icl::target_logprob_backward_workspace_bytes(a) > 0);
    icl::target_logprob_backward(
        a, {grad_logp.at.get(), grad_lse.at.get(), grad_hidden.at.get(), need_weight ? grad_weight.at.get() : nullptr,
            need_weight && a.bias != nullptr ? grad_bias.at.get() : nullptr});
    Block<float> gradient(R * E);
    require(icl::target_logprob_sum_workspace_bytes(a) > 0);
    icl::target_logprob_sum(a, grad_logp.at.get(), gradient.at.get());
    for (int64_t i = 0; !wild && i < a.R * a.E; ++i) require(std::abs(gradient.at[i]) <= 2 * (M + 1));
    for (int64_t i = 0; !wild && i < a.R * a.E; ++i) {  // at most the gradients times a weight, which is 1
        require(std::abs(number(grad_hidden.at.get(), i, a.bfloat16)) <= 2 * (M + 1));
    }
    for (int64_t c = 0; !wild && need_weight && a.E > 0 && c < a.V * a.E; ++c) {
        require(std::abs(number(grad_weight.at.get(), c, a.bfloat16)) <= 2 * (M + R));
    }
}

void fuzz_linear(FuzzedDataProvider& data) {
    const int64_t R = data.ConsumeIntegralInRange(0, 20), O = data.ConsumeIntegralInRange(0, 120);
    const int64_t E = data.ConsumeIntegralInRange(0, data.ConsumeBool() ? 40 : 1200);
    icl::Linear a{};
    a.bfloat16 = data.ConsumeBool();
    const bool wild = data.ConsumeIntegralInRange(0, 3) == 0;
    const int64_t gap_x = data.ConsumeIntegralInRange(0, 3), gap_weight = data.ConsumeIntegralInRange(0, 3);
    const Tensor<1> x(data, a.bfloat16, {R ? (R - 1) * (E + gap_x) + E : 0}, wild),
        weight(data, a.bfloat16, {O ? (O - 1) * (E + gap_weight) + E : 0}, wild), bias(data, a.bfloat16, {O}, wild);
    if (x.strides[0] != 1 || weight.strides[0] != 1 || bias.strides[0] != 1) return;
    Block<char> out(R * O * (a.bfloat16 ? 2 : 4));
    a.R = R, a.E = E, a.O = O;
    int64_t* const sizes[] = {&a.R, &a.E, &a.O};
    int64_t& size = *data.PickValueInArray(sizes);
    const int64_t given = hostile(data, size);
    if (given < 0 || given > icl::kMaxIndex || given <= size) size = given;
    a.x = x.bytes.at.get(), a.weight = weight.bytes.at.get();
    a.x_stride = E + gap_x, a.weight_stride = E + gap_weight;
    a.bias = data.ConsumeBool() ? bias.bytes.at.get() : nullptr;
    a.isa = data.ConsumeIntegralInRange(0, icl::best_isa());
    a.out = out.at.get();
    icl::linear(a);
    for (int64_t r = 0; !wild && r < a.R; ++r) {
        for (int64_t o = 0; o < a.O; o += 7) {
            double expected = a.bias == nullptr ? 0 : bias({o});
            for (int64_t e = 0; e < a.E; ++e) expected += x({r * a.x_stride + e}) * weight({o * a.weight_stride + e});
            const double got = number(out.at.get(), r * a.O + o, a.bfloat16);
            require(std::abs(got - expected) <= (a.bfloat16 ? 8e-3 : 1e-4) * (1 + std::abs(expected)));
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
    FuzzedDataProvider data(bytes, size);
    constexpr void (*kFunctions[])(FuzzedDataProvider&) = {fuzz_trie, fuzz_ancestors, fuzz_attention, fuzz_head,
                                                           fuzz_linear};
    try {
        data.PickValueInArray(kFunctions)(data);
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
