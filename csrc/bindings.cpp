// The Python face of icl.h: checks shapes, allocates outputs, releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "icl.h"
#include "tensors.h"

// The capsule stays its owner's, who holds it while a function runs.
template <>
struct pybind11::detail::type_caster<icl::Tensor> {
    PYBIND11_TYPE_CASTER(icl::Tensor, const_name("types.CapsuleType"));
    bool load(handle source, bool) {
        if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
        value.fields = static_cast<const icl::TensorFields*>(PyCapsule_GetPointer(source.ptr(), "dltensor"));
        return true;
    }
};

namespace py = pybind11;
using icl::dense, icl::dense_floats, icl::floats, icl::is_bfloat16, icl::Tensor;

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
                    const std::optional<Array<int32_t>>& head, bool whole) {
    require_vector(context_lengths, "context_lengths");
    icl::Requests requests{sequences(tokens, offsets, "offsets"), context_lengths.data(),
                           sequences(head_tokens, head_offsets, "head_offsets"), head ? head->data() : nullptr, whole};
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
        sizes = icl::trie_sizes(sorted, whole);
    }
    py::dict result;
    const auto allocate = [&](const char* name, int64_t size) {
        py::array_t<int32_t> array(size);
        result[name] = array;
        return array.mutable_data();
    };
    py::array_t<int64_t> path_offset(requests.tails.num_sequences + 1);
    result["path_offset"] = path_offset;
    const icl::TrieArrays out{
        allocate("node_token", sizes.nodes),  allocate("node_depth", sizes.nodes),
        allocate("node_end", sizes.nodes),    allocate("node_parent", sizes.nodes),
        allocate("token", sizes.rows),        allocate("depth", sizes.rows),
        allocate("end", sizes.rows),          allocate("parent", sizes.rows),
        allocate("row_node", sizes.rows),     allocate("scored_token", sizes.scored),
        allocate("scored_row", sizes.scored), allocate("path", sizes.path),
        path_offset.mutable_data(),           allocate("last_row", requests.tails.num_sequences),
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

icl::TargetLogprob target_logprob_arguments(const Tensor& hidden, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& row, const Tensor& target,
                                            float scale, float softcap, int isa, int num_threads) {
    icl::TargetLogprob args{};
    args.bfloat16 = is_bfloat16(hidden);
    const auto h = floats<2>(args.bfloat16, hidden, "hidden", {-1, -1});
    const auto w = floats<2>(args.bfloat16, weight, "weight", {-1, h.shape[1]});
    const auto r = icl::view<1>(icl::kInt32, row, "row", {-1}, true);
    args.hidden = h.data;
    args.weight = w.data;
    std::copy(h.strides.begin(), h.strides.end(), args.hidden_strides);
    std::copy(w.strides.begin(), w.strides.end(), args.weight_strides);
    if (bias) {
        const auto b = floats<1>(args.bfloat16, *bias, "bias", {w.shape[0]});
        args.bias = b.data;
        args.bias_stride = b.strides[0];
    }
    args.R = h.shape[0];
    args.E = h.shape[1];
    args.V = w.shape[0];
    args.M = r.shape[0];
    args.row = static_cast<const int32_t*>(r.data);
    args.target = dense<int32_t, 1>(target, "target", {args.M});
    args.scale = scale;
    args.softcap = softcap;
    args.isa = isa;
    args.num_threads = num_threads;
    return args;
}

void target_logprob(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& row,
                    const Tensor& target, float scale, float softcap, bool batch_invariant, int isa, int num_threads,
                    const Tensor& logp, const Tensor& is_argmax, const Tensor& lse) {
    auto args = target_logprob_arguments(hidden, weight, bias, row, target, scale, softcap, isa, num_threads);
    args.lse = dense<float, 1>(lse, "lse", {args.R});
    args.batch_invariant = batch_invariant;
    args.logp = dense<float, 1>(logp, "logp", {args.M});
    args.is_argmax = dense<bool, 1>(is_argmax, "is_argmax", {args.M});
    py::gil_scoped_release release;
    icl::target_logprob(args);
}

// Of weight and bias or of neither; bias has one if it is there.
void target_logprob_backward(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& row, const Tensor& target, float scale, float softcap, int isa,
                             int num_threads, const Tensor& lse, const Tensor& grad_logp, const Tensor& grad_lse,
                             const Tensor& grad_hidden, const std::optional<Tensor>& grad_weight,
                             const std::optional<Tensor>& grad_bias) {
    auto args = target_logprob_arguments(hidden, weight, bias, row, target, scale, softcap, isa, num_threads);
    args.lse = dense<float, 1>(lse, "lse", {args.R});
    icl::TargetLogprobGradients gradients{};
    gradients.grad_logp = dense<float, 1>(grad_logp, "grad_logp", {args.M});
    gradients.grad_lse = dense<float, 1>(grad_lse, "grad_lse", {args.R});
    gradients.grad_hidden = dense_floats<2>(args.bfloat16, grad_hidden, "grad_hidden", {args.R, args.E});
    if (grad_weight) {
        gradients.grad_weight = dense_floats<2>(args.bfloat16, *grad_weight, "grad_weight", {args.V, args.E});
        if (grad_bias) gradients.grad_bias = dense_floats<1>(args.bfloat16, *grad_bias, "grad_bias", {args.V});
    }
    py::gil_scoped_release release;
    icl::target_logprob_backward(args, gradients);
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int isa, const Tensor& out) {
    icl::Linear args{};
    args.bfloat16 = is_bfloat16(x);
    const auto rows = floats<2>(args.bfloat16, x, "x", {-1, -1});
    const auto [R, E] = rows.shape;
    const auto columns = floats<2>(args.bfloat16, weight, "weight", {-1, E});
    for (const auto& [name, strides] : {std::pair("x", rows.strides), std::pair("weight", columns.strides)}) {
        if (strides[1] != 1) throw py::value_error(std::string(name) + ": expected rows of neighbouring elements");
    }
    args.R = R;
    args.E = E;
    args.O = columns.shape[0];
    args.x = rows.data;
    args.x_stride = rows.strides[0];
    args.weight = columns.data;
    args.weight_stride = columns.strides[0];
    if (bias) args.bias = dense_floats<1>(args.bfloat16, *bias, "bias", {args.O});
    args.isa = isa;
    args.out = dense_floats<2>(args.bfloat16, out, "out", {R, args.O});
    py::gil_scoped_release release;
    icl::linear(args);
}

void target_logprob_sum(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& row, const Tensor& target, float scale, float softcap, int isa, int num_threads,
                        const Tensor& target_weight, const Tensor& logp, const Tensor& grad_hidden) {
    auto args = target_logprob_arguments(hidden, weight, bias, row, target, scale, softcap, isa, num_threads);
    const auto factors = dense<float, 1>(target_weight, "target_weight", {args.M});
    args.logp = dense<float, 1>(logp, "logp", {args.M});
    auto* gradient = dense<float, 2>(grad_hidden, "grad_hidden", {args.R, args.E});
    py::gil_scoped_release release;
    icl::target_logprob_sum(args, factors, gradient);
}

// Of target_logprob, its backward or target_logprob_sum, by the name's end.
int64_t target_logprob_workspace_bytes(bool bfloat16, std::array<int64_t, 4> sizes, bool contiguous, int isa,
                                       int num_threads, const std::string& of) {
    icl::TargetLogprob args{};
    args.bfloat16 = bfloat16;
    args.weight_strides[1] = contiguous ? 1 : 2;
    args.R = sizes[0];
    args.E = sizes[1];
    args.V = sizes[2];
    args.M = sizes[3];
    args.isa = isa;
    args.num_threads = num_threads;
    return of == "sum"        ? icl::target_logprob_sum_workspace_bytes(args)
           : of == "backward" ? icl::target_logprob_backward_workspace_bytes(args)
                              : icl::target_logprob_workspace_bytes(args);
}

icl::TrieAttention trie_attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_q,
                                            const Tensor& end_k, const Tensor& depth_q, const Tensor& depth_k,
                                            const std::optional<Tensor>& sinks, float scale, int32_t window,
                                            float softcap, bool batch_invariant, int isa, const Tensor& out,
                                            const Tensor& lse) {
    icl::TrieAttention args{};
    const bool bfloat16 = args.bfloat16 = is_bfloat16(q);
    const auto queries = floats<3>(bfloat16, q, "q", {-1, -1, -1});
    const auto [T, H, D] = queries.shape;
    const auto keys = floats<3>(bfloat16, k, "k", {-1, -1, D});
    const auto [S, G, _] = keys.shape;
    const auto values = floats<3>(bfloat16, v, "v", {S, G, -1});
    args.T = T, args.H = H, args.D = D;
    args.S = S, args.G = G, args.Dv = values.shape[2];
    args.q = queries.data;
    args.k = keys.data;
    args.v = values.data;
    std::copy(queries.strides.begin(), queries.strides.end(), args.q_strides);
    std::copy(keys.strides.begin(), keys.strides.end(), args.k_strides);
    std::copy(values.strides.begin(), values.strides.end(), args.v_strides);
    args.row_q = dense<int32_t, 1>(row_q, "row_q", {T});
    args.end_k = dense<int32_t, 1>(end_k, "end_k", {S});
    args.depth_q = dense<int32_t, 1>(depth_q, "depth_q", {T});
    args.depth_k = dense<int32_t, 1>(depth_k, "depth_k", {S});
    if (sinks) args.sinks = dense<float, 1>(*sinks, "sinks", {H});
    args.scale = scale;
    args.softcap = softcap;
    args.window = window;
    args.batch_invariant = batch_invariant;
    args.out = dense_floats<3>(bfloat16, out, "out", {T, H, args.Dv});
    args.lse = dense<float, 2>(lse, "lse", {T, H});
    args.isa = isa;
    return args;
}

void trie_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_q, const Tensor& end_k,
                    const Tensor& depth_q, const Tensor& depth_k, const std::optional<Tensor>& sinks, float scale,
                    int32_t window, float softcap, bool batch_invariant, int isa, const Tensor& out,
                    const Tensor& lse) {
    const auto args = trie_attention_arguments(q, k, v, row_q, end_k, depth_q, depth_k, sinks, scale, window, softcap,
                                               batch_invariant, isa, out, lse);
    py::gil_scoped_release release;
    icl::trie_attention(args);
}

void trie_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_q,
                             const Tensor& end_k, const Tensor& depth_q, const Tensor& depth_k,
                             const std::optional<Tensor>& sinks, float scale, int32_t window, float softcap, int isa,
                             const Tensor& out, const Tensor& lse, const Tensor& grad_out, const Tensor& grad_lse,
                             const Tensor& delta, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
    const auto args = trie_attention_arguments(q, k, v, row_q, end_k, depth_q, depth_k, sinks, scale, window, softcap,
                                               false, isa, out, lse);
    const auto gradient = [&](const Tensor& tensor, const char* argument, std::array<int64_t, 3> shape) {
        return dense_floats<3>(args.bfloat16, tensor, argument, shape);
    };
    icl::TrieAttentionGradients gradients{};
    const auto of_out = floats<3>(args.bfloat16, grad_out, "grad_out", {args.T, args.H, args.Dv});
    gradients.grad_out = of_out.data;
    std::copy(of_out.strides.begin(), of_out.strides.end(), gradients.grad_out_strides);
    gradients.grad_lse = dense<float, 2>(grad_lse, "grad_lse", {args.T, args.H});
    gradients.delta = dense<float, 2>(delta, "delta", {args.T, args.H});
    gradients.grad_q = gradient(grad_q, "grad_q", {args.T, args.H, args.D});
    gradients.grad_k = gradient(grad_k, "grad_k", {args.S, args.G, args.D});
    gradients.grad_v = gradient(grad_v, "grad_v", {args.S, args.G, args.Dv});
    py::gil_scoped_release release;
    icl::trie_attention_backward(args, gradients);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using py::arg;
    m.def("trie_build", &trie_build, arg("tokens").noconvert(), arg("offsets").noconvert(),
          arg("context_lengths").noconvert(), arg("head_tokens").noconvert(), arg("head_offsets").noconvert(),
          arg("head").noconvert(), arg("whole"));
    m.def("trie_ancestors", &trie_ancestors, arg("parent").noconvert(), arg("row"), arg("out").noconvert());
    m.def("best_isa", &icl::best_isa);
    m.def("sleep_at_barriers", &icl::sleep_at_barriers);
    m.def("target_logprob", &target_logprob);
    m.def("target_logprob_backward", &target_logprob_backward);
    m.def("target_logprob_sum", &target_logprob_sum);
    m.def("target_logprob_workspace_bytes", &target_logprob_workspace_bytes, arg("bfloat16"), arg("sizes"),
          arg("contiguous"), arg("isa"), arg("num_threads"), arg("of") = "");
    m.def("linear", &linear);
    m.def("trie_attention", &trie_attention);
    m.def("trie_attention_backward", &trie_attention_backward);
}
