// The Python face of icl.h: checks shapes, allocates outputs, releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "icl.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require_vector(const py::array& array, const char* argument) {
    if (array.ndim() != 1) throw py::value_error(std::string(argument) + ": expected one dimension");
}

icl::Sequences sequences(const Array<int32_t>& tokens, const Array<int64_t>& offsets, const char* name) {
    require_vector(tokens, name);
    require_vector(offsets, name);
    if (offsets.size() == 0) throw py::value_error(std::string(name) + ": expected at least one value");
    return {tokens.data(), tokens.size(), offsets.data(), offsets.size() - 1};
}

py::dict trie_build(const Array<int32_t>& tokens, const Array<int64_t>& offsets, const Array<int64_t>& context_lengths,
                    const Array<int32_t>& head_tokens, const Array<int64_t>& head_offsets,
                    const std::optional<Array<int32_t>>& head) {
    require_vector(context_lengths, "context_lengths");
    icl::Requests requests{sequences(tokens, offsets, "offsets"), context_lengths.data(),
                           sequences(head_tokens, head_offsets, "head_offsets"), head ? head->data() : nullptr};
    const auto require_size = [&](const char* name, int64_t size) {
        if (offsets.size() != size + 1) {
            throw py::value_error(std::string("offsets: expected one more value than ") + name + ", " +
                                  std::to_string(size + 1) + ", got " + std::to_string(offsets.size()));
        }
    };
    require_size("context_lengths", context_lengths.size());
    if (head) {
        require_vector(*head, "head");
        require_size("head", head->size());
    }
    std::vector<icl::SortedRequest> sorted;
    icl::TrieSizes sizes;
    {
        py::gil_scoped_release release;
        sorted = icl::trie_sort(requests);
        sizes = icl::trie_sizes(sorted);
    }
    py::dict result;
    const auto allocate = [&](const char* name, int64_t size) {
        py::array_t<int32_t> array(size);
        result[name] = array;
        return array.mutable_data();
    };
    py::array_t<int64_t> path_offset(requests.tails.count + 1);
    result["path_offset"] = path_offset;
    const icl::TrieArrays out{
        allocate("node_token", sizes.nodes),  allocate("node_depth", sizes.nodes),
        allocate("node_end", sizes.nodes),    allocate("node_parent", sizes.nodes),
        allocate("token", sizes.rows),        allocate("depth", sizes.rows),
        allocate("end", sizes.rows),          allocate("parent", sizes.rows),
        allocate("row_node", sizes.rows),     allocate("scored_token", sizes.scored),
        allocate("scored_row", sizes.scored), allocate("path", sizes.path),
        path_offset.mutable_data(),
    };
    {
        py::gil_scoped_release release;
        icl::trie_fill(requests, sorted, sizes, out);
    }
    return result;
}

void trie_ancestors(const Array<int32_t>& parent, int64_t row, Array<int32_t> out) {
    require_vector(parent, "parent");
    require_vector(out, "out");
    icl::trie_ancestors(parent.data(), parent.size(), row, out.mutable_data(), out.size());
}

// Tensors come as addresses; ops.py has checked them and allocated the results.
template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void target_logprob(bool bfloat16, uintptr_t hidden, std::array<int64_t, 2> hidden_stride, uintptr_t weight,
                    std::array<int64_t, 2> weight_stride, uintptr_t bias, int64_t bias_stride,
                    std::array<int64_t, 4> sizes, uintptr_t row, uintptr_t target, float scale, float softcap, int isa,
                    int num_threads, uintptr_t logp, uintptr_t is_argmax, uintptr_t lse) {
    icl::TargetLogprob args{};
    args.bfloat16 = bfloat16;
    args.hidden = pointer<const void>(hidden);
    args.weight = pointer<const void>(weight);
    args.bias = pointer<const void>(bias);
    for (int i : {0, 1}) {
        args.hidden_stride[i] = hidden_stride[i];
        args.weight_stride[i] = weight_stride[i];
    }
    args.bias_stride = bias_stride;
    args.num_rows = sizes[0];
    args.width = sizes[1];
    args.vocabulary = sizes[2];
    args.num_targets = sizes[3];
    args.row = pointer<const int32_t>(row);
    args.target = pointer<const int32_t>(target);
    args.scale = scale;
    args.softcap = softcap;
    args.isa = isa;
    args.num_threads = num_threads;
    args.logp = pointer<float>(logp);
    args.is_argmax = pointer<bool>(is_argmax);
    args.lse = pointer<float>(lse);
    py::gil_scoped_release release;
    icl::target_logprob(args);
}

int64_t target_logprob_workspace_bytes(bool bfloat16, std::array<int64_t, 4> sizes, bool contiguous, int isa,
                                       int num_threads) {
    icl::TargetLogprob args{};
    args.bfloat16 = bfloat16;
    args.weight_stride[1] = contiguous ? 1 : 2;
    args.num_rows = sizes[0];
    args.width = sizes[1];
    args.vocabulary = sizes[2];
    args.num_targets = sizes[3];
    args.isa = isa;
    args.num_threads = num_threads;
    return icl::target_logprob_workspace_bytes(args);
}

using Triple = std::array<int64_t, 3>;

void trie_attention(uintptr_t q, uintptr_t k, uintptr_t v, Triple q_shape, Triple v_shape, Triple q_strides,
                    Triple k_strides, Triple v_strides, bool bf16, uintptr_t row_q, uintptr_t end_k, uintptr_t depth_q,
                    uintptr_t depth_k, uintptr_t sinks, double scale, int32_t window, double softcap, uintptr_t out,
                    uintptr_t lse, int isa) {
    icl::TrieAttention arguments{};
    arguments.bf16 = bf16;
    arguments.T = q_shape[0], arguments.H = q_shape[1], arguments.D = q_shape[2];
    arguments.S = v_shape[0], arguments.G = v_shape[1], arguments.Dv = v_shape[2];
    arguments.q = pointer<const void>(q);
    arguments.k = pointer<const void>(k);
    arguments.v = pointer<const void>(v);
    std::copy(q_strides.begin(), q_strides.end(), arguments.q_strides);
    std::copy(k_strides.begin(), k_strides.end(), arguments.k_strides);
    std::copy(v_strides.begin(), v_strides.end(), arguments.v_strides);
    arguments.row_q = pointer<const int32_t>(row_q);
    arguments.end_k = pointer<const int32_t>(end_k);
    arguments.depth_q = pointer<const int32_t>(depth_q);
    arguments.depth_k = pointer<const int32_t>(depth_k);
    arguments.sinks = pointer<const float>(sinks);
    arguments.scale = static_cast<float>(scale);
    arguments.softcap = static_cast<float>(softcap);
    arguments.window = window;
    arguments.out = pointer<void>(out);
    arguments.lse = pointer<float>(lse);
    arguments.isa = isa;
    py::gil_scoped_release release;
    icl::trie_attention(arguments);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using py::arg;
    m.def("trie_build", &trie_build, arg("tokens").noconvert(), arg("offsets").noconvert(),
          arg("context_lengths").noconvert(), arg("head_tokens").noconvert(), arg("head_offsets").noconvert(),
          arg("head").noconvert());
    m.def("trie_ancestors", &trie_ancestors, arg("parent").noconvert(), arg("row"), arg("out").noconvert());
    m.def("best_isa", &icl::best_isa);
    m.def("target_logprob", &target_logprob);
    m.def("target_logprob_workspace_bytes", &target_logprob_workspace_bytes, arg("bfloat16"), arg("sizes"),
          arg("contiguous"), arg("isa"), arg("num_threads"));
    m.def("trie_attention", &trie_attention, arg("q"), arg("k"), arg("v"), arg("q_shape"), arg("v_shape"),
          arg("q_strides"), arg("k_strides"), arg("v_strides"), arg("bf16"), arg("row_q"), arg("end_k"), arg("depth_q"),
          arg("depth_k"), arg("sinks"), arg("scale"), arg("window"), arg("softcap"), arg("out"), arg("lse"),
          arg("isa"));
}
