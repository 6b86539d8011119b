// The prefix trie of a set of requests: sort them, then walk the sorted list with the open path as a stack.
#include <algorithm>
#include <cstring>

#include "icl.h"

namespace icl {
namespace {

void require(bool holds, const char* argument, const std::string& expected, int64_t got) {
    if (!holds) {
        throw std::invalid_argument(std::string(argument) + ": expected " + expected + ", got " + std::to_string(got));
    }
}

std::string of_request(int64_t r) { return " (request " + std::to_string(r) + ")"; }

void check(const Sequences& all, const char* offsets, const std::string& what) {
    require_range((what + "s").c_str(), all.num_sequences, 0);
    require(all.offsets[0] == 0, offsets, "0 first", all.offsets[0]);
    require(all.offsets[all.num_sequences] == all.num_tokens, offsets,
            "the number of tokens last, " + std::to_string(all.num_tokens), all.offsets[all.num_sequences]);
    for (int64_t i = 0; i < all.num_sequences; ++i) {
        // Compared, not subtracted: the difference of two hostile offsets can overflow.
        const int64_t first = all.offsets[i], last = all.offsets[i + 1];
        if (last < first || last > all.num_tokens) {
            require(false, offsets,
                    "ascending values up to the number of tokens (" + what + " " + std::to_string(i) + ")", last);
        }
    }
}

int64_t length_of(const Sequences& all, int64_t i) { return all.offsets[i + 1] - all.offsets[i]; }

void check(const Requests& requests) {
    check(requests.tails, "offsets", "request");
    if (requests.head != nullptr) check(requests.heads, "head_offsets", "head");
    for (int64_t r = 0; r < requests.tails.num_sequences; ++r) {
        int64_t length = length_of(requests.tails, r);
        if (requests.head != nullptr) {
            const int64_t head = requests.head[r];
            if (head < 0 || head >= requests.heads.num_sequences) {
                require(false, "head", "0 <= head < " + std::to_string(requests.heads.num_sequences) + of_request(r),
                        head);
            }
            length += length_of(requests.heads, head);
        }
        const int64_t context = requests.context_lengths[r];
        if (length > kMaxIndex) require(false, "offsets", "fewer than 2^31 tokens" + of_request(r), length);
        if (context < 1 || context >= length + requests.whole) {
            const std::string range = requests.whole ? "1 <= context <= length " : "1 <= context < length ";
            require(false, "context_lengths", range + std::to_string(length) + of_request(r), context);
        }
    }
}

// A request's tokens, in two stretches.
struct Slice {
    const int32_t *head, *tail;
    int32_t head_length, length;

    const int32_t* at(int32_t i) const { return i < head_length ? head + i : tail + (i - head_length); }
    int32_t stretch_end(int32_t i) const { return i < head_length ? head_length : length; }
};

Slice slice(const Requests& requests, int32_t r) {
    Slice slice{nullptr, requests.tails.tokens + requests.tails.offsets[r], 0, 0};
    if (requests.head != nullptr) {
        slice.head = requests.heads.tokens + requests.heads.offsets[requests.head[r]];
        slice.head_length = static_cast<int32_t>(length_of(requests.heads, requests.head[r]));
    }
    slice.length = slice.head_length + static_cast<int32_t>(length_of(requests.tails, r));
    return slice;
}

// How many of the first n tokens are equal; whole blocks go through memcmp, which runs at memory speed.
int32_t common_prefix(const int32_t* a, const int32_t* b, int32_t n) {
    constexpr int32_t block = 64;
    int32_t i = 0;
    while (n - i >= block && std::memcmp(a + i, b + i, block * sizeof(int32_t)) == 0) i += block;
    while (i < n && a[i] == b[i]) ++i;
    return i;
}

// How many tokens two requests share that are known to share the first `shared`.
int32_t common_prefix(Slice a, Slice b, int32_t shared) {
    if (a.head == b.head) shared = std::max(shared, std::min(a.head_length, b.head_length));
    const int32_t most = std::min(a.length, b.length);
    while (shared < most) {
        const int32_t end = std::min({most, a.stretch_end(shared), b.stretch_end(shared)});
        shared += common_prefix(a.at(shared), b.at(shared), end - shared);
        if (shared < end) break;
    }
    return shared;
}

// Requests sort by where they leave a pivot and with which token. The upper half of the key is the number of tokens
// shared with the pivot, complemented when the request is greater than the pivot (those that leave later then come
// first); the lower half is the next token plus one, 0 where the request ends.
struct Entry {
    uint64_t key;
    int32_t request;
};

Entry entry(const Requests& requests, int32_t r, Slice pivot, int32_t depth) {
    const Slice own = slice(requests, r);
    const int32_t shared = common_prefix(own, pivot, depth);
    const uint32_t next = shared < own.length ? *own.at(shared) + 1u : 0u;
    const uint32_t pivot_next = shared < pivot.length ? *pivot.at(shared) + 1u : 0u;
    const uint32_t leaves = next > pivot_next ? ~static_cast<uint32_t>(shared) : shared;
    return {static_cast<uint64_t>(leaves) << 32 | next, r};
}

int32_t shared_with_pivot(Entry e) {
    const uint32_t leaves = e.key >> 32;
    return leaves >> 31 ? ~leaves : leaves;
}

bool ends(Entry e) { return static_cast<uint32_t>(e.key) == 0; }

// A stretch of the path from a root to the node last visited: the nodes at depths below `depth`, down to the stretch
// before it, are base + their depth.
struct Segment {
    int32_t depth, base;
    int32_t context;  // least context length among the requests seen through the stretch's last node
};

// Visits the sorted requests, keeping the path to the current one as segments. enter(request, path, node)
// finds a request whose nodes from depth `shared` on are new and numbered from `node`; leave(base, first, last,
// context, node) finds depths first..last of the path complete, their subtrees ending before `node`.
template <class Enter, class Leave>
void walk(const std::vector<SortedRequest>& sorted, Enter&& enter, Leave&& leave) {
    std::vector<Segment> path;
    int32_t node = 0;
    for (size_t i = 0; i <= sorted.size(); ++i) {
        const int32_t shared = i < sorted.size() ? sorted[i].shared : 0;
        while (!path.empty() && path.back().depth > shared) {
            const Segment top = path.back();
            path.pop_back();
            const int32_t start = path.empty() ? 0 : path.back().depth;
            const int32_t cut = std::max(start, shared);
            leave(top.base, cut, top.depth, top.context, node);
            if (cut > start) {
                path.push_back({cut, top.base, top.context});
            } else if (!path.empty()) {
                path.back().context = std::min(path.back().context, top.context);
            }
        }
        if (i == sorted.size()) break;
        const SortedRequest& request = sorted[i];
        if (request.length > shared) {
            path.push_back({request.length, node - shared, request.context});
        } else {
            path.back().context = std::min(path.back().context, request.context);
        }
        enter(request, path, node);
        node += request.length - shared;
    }
}

}  // namespace

std::vector<SortedRequest> trie_sort(const Requests& requests) {
    check(requests);
    struct Group {
        size_t first, last;
        int32_t depth;  // tokens known to be shared
    };
    const size_t num_requests = requests.tails.num_sequences;
    std::vector<Entry> entries(num_requests);
    for (size_t i = 0; i < num_requests; ++i) entries[i].request = static_cast<int32_t>(i);
    std::vector<SortedRequest> sorted(num_requests);
    std::vector<Group> groups;
    if (num_requests > 1) groups.push_back({0, num_requests, 0});
    const auto less = [](const Entry& a, const Entry& b) { return a.key < b.key; };
    // Each round takes every request of a group at least one token further, so no order of requests is quadratic.
    while (!groups.empty()) {
        const Group group = groups.back();
        groups.pop_back();
        const Slice pivot = slice(requests, entries[group.first + (group.last - group.first) / 2].request);
        const auto begin = entries.begin() + group.first, end = entries.begin() + group.last;
        for (auto e = begin; e != end; ++e) *e = entry(requests, e->request, pivot, group.depth);
        if (!std::is_sorted(begin, end, less)) std::sort(begin, end, less);
        size_t first = group.first;
        for (size_t i = group.first + 1; i <= group.last; ++i) {
            const Entry& last = entries[i - 1];
            const int32_t shared = shared_with_pivot(last);
            if (i < group.last) {
                sorted[i].shared = std::min(shared, shared_with_pivot(entries[i]));
                if (entries[i].key == last.key) continue;
            }
            if (i - first > 1 && !ends(last)) groups.push_back({first, i, shared + 1});
            first = i;
        }
    }
    for (size_t i = 0; i < num_requests; ++i) {
        const int32_t r = entries[i].request;
        sorted[i].request = r;
        sorted[i].length = slice(requests, r).length;
        sorted[i].context = static_cast<int32_t>(requests.context_lengths[r]);
    }
    return sorted;
}

TrieSizes trie_sizes(const std::vector<SortedRequest>& sorted, bool whole) {
    TrieSizes sizes{};
    for (const SortedRequest& request : sorted) {
        sizes.nodes += request.length - request.shared;
        sizes.path += request.length - request.context;
    }
    require(sizes.nodes <= kMaxIndex, "tokens", "fewer than 2^31 distinct prefixes", sizes.nodes);
    sizes.rows = sizes.nodes;
    walk(
        sorted, [](auto&&...) {},
        [&](int32_t base, int32_t first, int32_t last, int32_t context, int32_t node) {
            sizes.scored += std::max(0, last - std::max(first, context));
            sizes.rows -= !whole && base + last == node;
        });
    return sizes;
}

void trie_fill(const Requests& requests, const std::vector<SortedRequest>& sorted, const TrieSizes& sizes,
               const TrieArrays& out) {
    out.path_offset[0] = 0;
    for (const SortedRequest& request : sorted) out.path_offset[request.request + 1] = request.length - request.context;
    for (size_t r = 0; r < sorted.size(); ++r) out.path_offset[r + 1] += out.path_offset[r];

    std::vector<int32_t> scored(sizes.nodes), row(sizes.nodes + 1);
    walk(
        sorted,
        [&](const SortedRequest& request, const std::vector<Segment>& path, int32_t node) {
            const size_t num_segments = path.size();
            const Slice own = slice(requests, request.request);
            for (int32_t depth = request.shared; depth < request.length; ++depth, ++node) {
                const int32_t token = *own.at(depth);
                if (token < 0) require(false, "tokens", "values >= 0" + of_request(request.request), token);
                const bool branches = depth == request.shared;
                out.node_token[node] = token;
                out.node_depth[node] = depth;
                out.node_parent[node] = !branches ? node - 1 : depth ? path[num_segments - 2].base + depth - 1 : -1;
            }
            const int64_t offset = out.path_offset[request.request] - request.context;
            int32_t last = request.length;
            for (size_t k = num_segments; last > request.context; --k) {
                const int32_t first = std::max(request.context, k > 1 ? path[k - 2].depth : 0);
                for (int32_t depth = first; depth < last; ++depth) out.path[offset + depth] = path[k - 1].base + depth;
                last = first;
            }
            out.last_row[request.request] = path.back().base + request.length - 1;  // a node, until rows are counted
        },
        [&](int32_t base, int32_t first, int32_t last, int32_t context, int32_t node) {
            for (int32_t depth = first; depth < last; ++depth) {
                out.node_end[base + depth] = node;
                scored[base + depth] = depth >= context;
            }
        });

    int32_t num_rows = 0, num_scored = 0;
    for (int32_t node = 0; node < sizes.nodes; ++node) {
        row[node] = num_rows;
        if (requests.whole || out.node_end[node] > node + 1) out.row_node[num_rows++] = node;
        if (scored[node]) {
            out.scored_token[num_scored] = out.node_token[node];
            out.scored_row[num_scored] = row[out.node_parent[node]];
            scored[node] = num_scored++;
        }
    }
    row[sizes.nodes] = num_rows;
    for (int32_t i = 0; i < num_rows; ++i) {
        const int32_t node = out.row_node[i], parent = out.node_parent[node];
        out.token[i] = out.node_token[node];
        out.depth[i] = out.node_depth[node];
        out.end[i] = row[out.node_end[node]];
        out.parent[i] = parent < 0 ? -1 : row[parent];
    }
    for (int64_t i = 0; i < sizes.path; ++i) out.path[i] = scored[out.path[i]];
    for (size_t r = 0; r < sorted.size(); ++r) {
        const int32_t node = out.last_row[r];
        out.last_row[r] = row[requests.whole ? node : out.node_parent[node]];
    }
}

void trie_ancestors(const int32_t* parent, int64_t num_rows, int64_t row, int32_t* out, int64_t num_out) {
    require(row >= 0 && row < num_rows, "row", "0 <= row < " + std::to_string(num_rows), row);
    int64_t i = num_out, at = row;
    for (; parent[at] >= 0; at = parent[at]) {
        if (parent[at] >= at) require(false, "parent", "a row before " + std::to_string(at), parent[at]);
        if (i == 0) break;
        out[--i] = parent[at];
    }
    require(i == 0 && parent[at] < 0, "out", "as many values as the row has ancestors", num_out);
}

}  // namespace icl
