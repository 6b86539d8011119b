// The Python face of icl.h: checks shapes, allocates outputs, releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "icl.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require_vector(const py::array& array, const char* argument) {
    if (array.ndim() != 1) throw py::value_error(std::string(argument) + ": expected one dimension");
}

py::dict trie_build(const Array<int32_t>& tokens, const Array<int64_t>& offsets,
                    const Array<int64_t>& context_lengths) {
    require_vector(tokens, "tokens");
    require_vector(offsets, "offsets");
    require_vector(context_lengths, "context_lengths");
    if (offsets.size() != context_lengths.size() + 1) {
        throw py::value_error("offsets: expected one more value than context_lengths, " +
                              std::to_string(context_lengths.size() + 1) + ", got " + std::to_string(offsets.size()));
    }
    const icl::Requests requests{tokens.data(), tokens.size(), offsets.data(), context_lengths.data(),
                                 context_lengths.size()};
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
    py::array_t<int64_t> path_offset(requests.num_requests + 1);
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
        icl::trie_fill(requests.tokens, sorted, sizes, out);
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
                    std::array<int64_t, 4> sizes, uintptr_t row, uintptr_t target, float scale, float softcap,
                    bool invariant, int isa, int num_threads, uintptr_t logp, uintptr_t is_argmax, uintptr_t lse) {
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
    args.invariant = invariant;
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

icl::TrieAttention trie_attention_arguments(uintptr_t q, uintptr_t k, uintptr_t v, Triple q_shape, Triple v_shape,
                                            Triple q_strides, Triple k_strides, Triple v_strides, bool bf16,
                                            uintptr_t row_q, uintptr_t end_k, uintptr_t depth_q, uintptr_t depth_k,
                                            uintptr_t sinks, double scale, int32_t window, double softcap,
                                            bool invariant, uintptr_t out, uintptr_t lse, int isa) {
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
    arguments.invariant = invariant;
    arguments.out = pointer<void>(out);
    arguments.lse = pointer<float>(lse);
    arguments.isa = isa;
    return arguments;
}

void trie_attention_backward(const icl::TrieAttention& arguments, uintptr_t grad_out, Triple grad_out_strides,
                             uintptr_t grad_lse, uintptr_t delta, uintptr_t grad_q, uintptr_t grad_k,
                             uintptr_t grad_v) {
    icl::TrieAttentionGradients gradients{};
    gradients.grad_out = pointer<const void>(grad_out);
    std::copy(grad_out_strides.begin(), grad_out_strides.end(), gradients.grad_out_strides);
    gradients.grad_lse = pointer<const float>(grad_lse);
    gradients.delta = pointer<float>(delta);
    gradients.grad_q = pointer<void>(grad_q);
    gradients.grad_k = pointer<void>(grad_k);
    gradients.grad_v = pointer<void>(grad_v);
    icl::trie_attention_backward(arguments, gradients);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using py::arg;
    m.def("trie_build", &trie_build, arg("tokens").noconvert(), arg("offsets").noconvert(),
          arg("context_lengths").noconvert());
    m.def("trie_ancestors", &trie_ancestors, arg("parent").noconvert(), arg("row"), arg("out").noconvert());
    m.def("best_isa", &icl::best_isa);
    m.def("target_logprob", &target_logprob);
    m.def("target_logprob_workspace_bytes", &target_logprob_workspace_bytes, arg("bfloat16"), arg("sizes"),
          arg("contiguous"), arg("isa"), arg("num_threads"));
    const py::call_guard<py::gil_scoped_release> without_gil;
    py::class_<icl::TrieAttention>(m, "TrieAttention")
        .def(py::init(&trie_attention_arguments), arg("q"), arg("k"), arg("v"), arg("q_shape"), arg("v_shape"),
             arg("q_strides"), arg("k_strides"), arg("v_strides"), arg("bf16"), arg("row_q"), arg("end_k"),
             arg("depth_q"), arg("depth_k"), arg("sinks"), arg("scale"), arg("window"), arg("softcap"),
             arg("invariant"), arg("out"), arg("lse"), arg("isa"));
    m.def("trie_attention", &icl::trie_attention, without_gil);
    m.def("trie_attention_backward", &trie_attention_backward, without_gil, arg("arguments"), arg("grad_out"),
          arg("grad_out_strides"), arg("grad_lse"), arg("delta"), arg("grad_q"), arg("grad_k"), arg("grad_v"));
}
