// The native API of icl_ft_fast: plain structs of pointers and sizes, and free functions that know neither Python nor
// torch. A function checks every size and offset before it touches memory and throws std::invalid_argument naming the
// argument. Arrays are contiguous unless they have strides, as long as their sizes say, aligned, and the caller's:
// nobody writes to them meanwhile.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace icl {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();  // of rows, tokens, heads, components

inline void require_range(const char* argument, int64_t value, int64_t least, int64_t most = kMaxIndex) {
    if (value < least || value > most) {
        throw std::invalid_argument(std::string(argument) + ": expected " + std::to_string(least) + " to " +
                                    std::to_string(most) + ", got " + std::to_string(value));
    }
}

// Sequences of tokens laid end to end: number i is tokens[offsets[i]:offsets[i + 1]].
struct Sequences {
    const int32_t* tokens;  // [num_tokens], >= 0
    int64_t num_tokens;
    const int64_t* offsets;  // [num_sequences + 1], from 0 to num_tokens
    int64_t num_sequences;
};

// Request r is heads[head[r]] followed by tails[r], or tails[r] alone where head is null. Its first context_lengths[r]
// tokens are context and the rest continuation, both at least one token. With `whole` the last token of every request
// is a row too, so that what comes after it can be predicted; a continuation may then be empty.
struct Requests {
    Sequences tails;                 // R of them
    const int64_t* context_lengths;  // [R]
    Sequences heads;
    const int32_t* head;  // [R] or null
    bool whole;
};

// One of the requests in lexicographic order, whose first `shared` tokens the one sorted before it has too.
struct SortedRequest {
    int32_t request, shared, length, context;
};

struct TrieSizes {
    int64_t nodes, rows, scored, path;
};

// Outputs of trie_fill, all int32 but path_offset; icl_ft_fast/engine/trie.py says what each means.
struct TrieArrays {
    int32_t *node_token, *node_depth, *node_end, *node_parent;  // [nodes]
    int32_t *token, *depth, *end, *parent, *row_node;           // [rows]
    int32_t *scored_token, *scored_row;                         // [scored]
    int32_t* path;                                              // [path]
    int64_t* path_offset;                                       // [R + 1]
    int32_t* last_row;                                          // [R]
};

// Every input token is compared about once, at memory speed: O(num_tokens log R) at worst, O(R) memory. Requests with
// the same head compare their tails only.
std::vector<SortedRequest> trie_sort(const Requests& requests);
TrieSizes trie_sizes(const std::vector<SortedRequest>& sorted, bool whole);
void trie_fill(const Requests& requests, const std::vector<SortedRequest>& sorted, const TrieSizes& sizes,
               const TrieArrays& out);

// The ancestors of a row, root first, into out[depth of row].
void trie_ancestors(const int32_t* parent, int64_t num_rows, int64_t row, int32_t* out, int64_t num_out);

// Instruction sets, each including those before it. What takes one takes kBestIsa for the best this processor has.
enum Isa { kBestIsa, kPortable, kAvx2, kAvx512, kAvx512Bf16 };
int best_isa();

// Whether threads of this process that wait for others sleep at once; see waiting.cpp.
void sleep_at_barriers(bool sleep);
int choose_isa(int isa);

// What icl_ft_fast/ops/target_logprob.py says target_logprob is, for float32 or bfloat16. Strides are in elements. The
// results' bits depend on the inputs and the instruction set, not on the threads.
struct TargetLogprob {
    bool bfloat16, batch_invariant;
    const void* hidden;  // [R, E]
    int64_t hidden_strides[2];
    const void* weight;  // [V, E]
    int64_t weight_strides[2];
    const void* bias;  // [V], or null
    int64_t bias_stride;
    int64_t R, V, E, M;           // hidden rows, tokens of the vocabulary, width, targets
    const int32_t *row, *target;  // [M]; out of range: logp is nan
    float scale, softcap;         // softcap 0: none
    int isa, num_threads;
    float* logp;      // [M]
    bool* is_argmax;  // [M]
    float* lse;       // [R]
};

// What its backward takes and gives besides; it reads lse, needs every row in range, and takes a target that is out of
// range for nobody's.
struct TargetLogprobGradients {
    const float *grad_logp, *grad_lse;            // [M], [R]
    void *grad_hidden, *grad_weight, *grad_bias;  // [R, E], [V, E] or null, [V] or null, contiguous
};

// What target_logprob allocates: up to a bound that R and V do not move, and 4 bytes a target. Its backward: up to a
// bound that V does not move, and three floats for each element of hidden. Reads no array.
int64_t target_logprob_workspace_bytes(const TargetLogprob& args);
int64_t target_logprob_backward_workspace_bytes(const TargetLogprob& args);
void target_logprob(const TargetLogprob& args);
void target_logprob_backward(const TargetLogprob& args, const TargetLogprobGradients& gradients);

// logp, and the gradient [R, E] of the sum of target_weight * logp in hidden, from logits that are made once. Writes
// neither is_argmax nor lse; needs every row in range, as the backward does, and allocates what it does and a tile
// more.
int64_t target_logprob_sum_workspace_bytes(const TargetLogprob& args);
void target_logprob_sum(const TargetLogprob& args, const float* target_weight, float* grad_hidden);

// out = x @ weight^T + bias, float32 or bfloat16, for few rows: made for fewer than 64. The strides, in elements,
// are of rows, whose elements lie side by side. A result's bits do not depend on the rows beside it, nor on the
// threads.
struct Linear {
    bool bfloat16;
    int64_t R, E, O;  // rows, elements of a row, results of a row
    const void* x;    // [R, E]
    int64_t x_stride;
    const void* weight;  // [O, E]
    int64_t weight_stride;
    const void* bias;  // [O], contiguous, or null
    int isa;
    void* out;  // [R, O], contiguous
};

void linear(const Linear& args);

// What icl_ft_fast/ops/trie_attention.py says trie_attention is, for float32 or bfloat16. Strides are in elements.
struct TrieAttention {
    bool bfloat16, batch_invariant;
    int64_t T, S, H, G, D, Dv;  // queries, keys, their heads, elements of a head of q and k, of v
    const void *q, *k, *v;      // [T, H, D], [S, G, D], [S, G, Dv]
    int64_t q_strides[3], k_strides[3], v_strides[3];
    const int32_t *row_q, *end_k, *depth_q, *depth_k;  // [T], [S], [T], [S]; compared, never followed
    const float* sinks;                                // [H] or null
    float scale, softcap;                              // softcap 0: none
    int32_t window;                                    // 0: none
    int isa;
    void* out;   // [T, H, Dv], contiguous
    float* lse;  // [T, H], contiguous
};

// What its backward takes and gives besides; it reads out and lse, and of the sinks only what lse has of them.
struct TrieAttentionGradients {
    const void* grad_out;  // [T, H, Dv]
    int64_t grad_out_strides[3];
    const float* grad_lse;           // [T, H], contiguous, as are the results
    float* delta;                    // [T, H], grad_out . out
    void *grad_q, *grad_k, *grad_v;  // [T, H, D], [S, G, D], [S, G, Dv]
};

// Bits do not depend on the number of threads.
void trie_attention(const TrieAttention& args);
void trie_attention_backward(const TrieAttention& args, const TrieAttentionGradients& gradients);

}  // namespace icl
