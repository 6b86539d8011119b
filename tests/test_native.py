"""The C++ entry points refuse by name what would have them leave a tensor's memory, however they are reached."""

import inspect

import numpy as np
import pytest
import torch
from native import call

from icl_ft_fast import _C, ops

INT = torch.int32


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def full(size, value):
    return torch.full((size,), value, dtype=INT)


def unaligned(tensor):
    array = tensor.numpy()
    return torch.from_numpy(np.frombuffer(bytearray(array.nbytes + 1), array.dtype, array.size, 1).reshape(array.shape))


ATTENTION = {
    "q": zeros(5, 4, 3),
    "k": zeros(7, 2, 3),
    "v": zeros(7, 2, 6),
    "row_q": zeros(5, dtype=INT),
    "end_k": zeros(7, dtype=INT),
    "depth_q": zeros(5, dtype=INT),
    "depth_k": zeros(7, dtype=INT),
    "sinks": zeros(4),
    "scale": 1.0,
    "window": 0,
    "softcap": 0.0,
    "batch_invariant": False,
    "isa": 0,
    "out": zeros(5, 4, 6),
    "lse": zeros(5, 4),
}
HEAD = {
    "hidden": zeros(5, 4),
    "weight": zeros(7, 4),
    "bias": zeros(7),
    "row": zeros(3, dtype=INT),
    "target": zeros(3, dtype=INT),
    "scale": 1.0,
    "softcap": 0.0,
    "batch_invariant": False,
    "isa": 0,
    "num_threads": 1,
    "logp": zeros(3),
    "is_argmax": zeros(3, dtype=bool),
    "lse": zeros(5),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", zeros(5, 4, 3, dtype=torch.float64), r"q: expected float32, got float64\(5, 4, 3\)"),
        ("q", zeros(5, 12), "q: expected 3 dimensions"),
        ("q", unaligned(zeros(5, 4, 3)), "q: expected aligned elements"),
        ("q", zeros(5, 4, 3, dtype=torch.bfloat16), "k: expected bfloat16"),  # bfloat16
        ("q", zeros(5, 3, 3), "sinks: expected 3"),
        ("k", zeros(7, 2, 4), "k: expected 3 in dimension 2"),
        ("k", zeros(7, 0, 3), "v: expected 0 in dimension 1"),
        ("v", zeros(6, 2, 6), "v: expected 7 in dimension 0"),
        ("v", zeros(7, 1, 6), "v: expected 2 in dimension 1"),
        ("row_q", zeros(4, dtype=INT), "row_q: expected 5 in dimension 0"),
        ("row_q", zeros(5, dtype=torch.int64), "row_q: expected int32"),
        ("end_k", zeros(8, dtype=INT), "end_k: expected 7"),
        ("end_k", zeros(14, dtype=INT)[::2], "end_k: expected a contiguous tensor"),
        ("depth_q", zeros(5, 1, dtype=INT), "depth_q: expected 1 dimensions"),
        ("depth_k", zeros(6, dtype=INT), "depth_k: expected 7"),
        ("sinks", zeros(3), "sinks: expected 4"),
        ("sinks", zeros(4, dtype=torch.float64), "sinks: expected float32"),
        ("window", -1, "window: expected 0 to 2147483647, got -1"),
        ("isa", 9, "isa: expected 0 to"),
        ("isa", -1, "isa: expected 0 to"),
        ("out", zeros(5, 4, 5), "out: expected 6 in dimension 2"),
        ("out", zeros(5, 4, 6, dtype=torch.bfloat16), "out: expected float32"),
        ("out", zeros(5, 6, 4).mT, "out: expected a contiguous tensor"),
        ("lse", zeros(4, 4), "lse: expected 5 in dimension 0"),
    ],
)
def test_trie_attention_refuses(name, value, message):
    call(_C.trie_attention, ATTENTION)
    with pytest.raises(ValueError, match=message):
        call(_C.trie_attention, ATTENTION | {name: value})


BACKWARD = {name: value for name, value in ATTENTION.items() if name != "batch_invariant"} | {
    "grad_out": zeros(5, 4, 6),
    "grad_lse": zeros(5, 4),
    "delta": zeros(5, 4),
    "grad_q": zeros(5, 4, 3),
    "grad_k": zeros(7, 2, 3),
    "grad_v": zeros(7, 2, 6),
}


@pytest.mark.parametrize("name", ["grad_out", "grad_lse", "delta", "grad_q", "grad_k", "grad_v"])
def test_trie_attention_s_backward_refuses(name):
    good = BACKWARD
    call(_C.trie_attention_backward, good)
    tensor = good[name]
    bad = [zeros(*tensor.shape, dtype=torch.float64), zeros(*tensor.shape, 1), tensor[:-1], tensor[..., 1:]]
    bad += [unaligned(tensor)]
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call(_C.trie_attention_backward, good | {name: value})
    for other in ("end_k", "out", "lse"):
        with pytest.raises(ValueError, match=f"^{other}: expected"):
            call(_C.trie_attention_backward, good | {other: good[other][:-1]})


@pytest.mark.parametrize("place", ["heads", "depth_q", "depth_k", "window", "isa"])
def test_trie_attention_s_backward_checks_what_its_forward_does(place):
    bad = {
        "heads": {"k": zeros(7, 3, 3), "v": zeros(7, 3, 6), "grad_k": zeros(7, 3, 3), "grad_v": zeros(7, 3, 6)},
        "depth_q": {"depth_q": full(5, -1), "window": 2},
        "depth_k": {"depth_k": full(7, -1), "window": 2},
        "window": {"window": -1},
        "isa": {"isa": 9},
    }[place]
    with pytest.raises(ValueError, match=f"{place}.*: expected"):
        call(_C.trie_attention_backward, BACKWARD | bad)


@pytest.mark.parametrize(("heads", "message"), [(0, "heads of k: expected 1 to"), (3, "those of k: .*got 1")])
def test_trie_attention_needs_heads_of_keys_that_divide_those_of_queries(heads, message):
    with pytest.raises(ValueError, match=message):
        call(_C.trie_attention, ATTENTION | {"k": zeros(7, heads, 3), "v": zeros(7, heads, 6)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", zeros(5, 4, dtype=torch.float16), "hidden: expected float32"),
        ("hidden", zeros(5, 4, 1), "hidden: expected 2 dimensions"),
        ("hidden", unaligned(zeros(5, 4)), "hidden: expected aligned elements"),
        ("hidden", zeros(5, 4, dtype=torch.bfloat16), "weight: expected bfloat16"),
        ("weight", zeros(7, 5), "weight: expected 4 in dimension 1"),
        ("bias", zeros(6), "bias: expected 7"),
        ("row", zeros(3, dtype=torch.int64), "row: expected int32"),
        ("row", zeros(6, dtype=INT)[::2], "row: expected a contiguous tensor"),
        ("target", zeros(4, dtype=INT), "target: expected 3"),
        ("isa", 9, "isa: expected 0 to"),
        ("logp", zeros(4), "logp: expected 3"),
        ("is_argmax", zeros(3), "is_argmax: expected bool"),
        ("lse", zeros(3), "lse: expected 5"),
    ],
)
def test_target_logprob_refuses(name, value, message):
    call(_C.target_logprob, HEAD)
    with pytest.raises(ValueError, match=message):
        call(_C.target_logprob, HEAD | {name: value})


HEAD_BACKWARD = {
    name: value for name, value in HEAD.items() if name not in ("batch_invariant", "logp", "is_argmax")
} | {
    "grad_logp": zeros(3),
    "grad_lse": zeros(5),
    "grad_hidden": zeros(5, 4),
    "grad_weight": zeros(7, 4),
    "grad_bias": zeros(7),
}


@pytest.mark.parametrize("name", ["lse", "grad_logp", "grad_lse", "grad_hidden", "grad_weight", "grad_bias"])
def test_target_logprob_s_backward_refuses(name):
    good = HEAD_BACKWARD
    call(_C.target_logprob_backward, good)
    tensor = good[name]
    bad = [zeros(*tensor.shape, dtype=torch.float64), zeros(*tensor.shape, 1), tensor[:-1], tensor[..., 1:]]
    bad += [unaligned(tensor)]
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call(_C.target_logprob_backward, good | {name: value})


@pytest.mark.parametrize("row", [-1, 5, 2**31 - 1])
def test_target_logprob_s_backward_checks_what_it_follows(row):
    with pytest.raises(ValueError, match=f"row: expected 0 to 4, got {row}"):
        call(_C.target_logprob_backward, HEAD_BACKWARD | {"row": full(3, row)})
    with pytest.raises(ValueError, match="isa: expected 0 to"):
        call(_C.target_logprob_backward, HEAD_BACKWARD | {"isa": 9})
    for target in (-1, 7, 2**31 - 1, -(2**31)):  # nobody's
        call(_C.target_logprob_backward, HEAD_BACKWARD | {"target": full(3, target)})


HEAD_SUM = {name: value for name, value in HEAD.items() if name not in ("batch_invariant", "logp", "is_argmax", "lse")}
HEAD_SUM |= {"target_weight": zeros(3), "logp": zeros(3), "grad_hidden": zeros(5, 4)}


def test_target_logprob_sum_refuses():
    call(_C.target_logprob_sum, HEAD_SUM)
    for name in ("target_weight", "logp", "grad_hidden"):
        tensor = HEAD_SUM[name]
        bad = [zeros(*tensor.shape, dtype=torch.float64), zeros(*tensor.shape, 1), tensor[:-1], tensor[..., 1:]]
        for value in [*bad, unaligned(tensor)]:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                call(_C.target_logprob_sum, HEAD_SUM | {name: value})
    for row in (-1, 5):
        with pytest.raises(ValueError, match=f"row: expected 0 to 4, got {row}"):
            call(_C.target_logprob_sum, HEAD_SUM | {"row": full(3, row)})
    for target in (-1, 7, 2**31 - 1, -(2**31)):  # nobody's
        call(_C.target_logprob_sum, HEAD_SUM | {"target": full(3, target)})
        assert HEAD_SUM["logp"].isnan().all()


def test_target_logprob_needs_a_vocabulary():
    with pytest.raises(ValueError, match="rows of weight: expected 1 to 2147483647, got 0"):
        call(_C.target_logprob, HEAD | {"weight": zeros(0, 4), "bias": None})


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("size", [-1, 2**31, 2**62])
def test_no_size_overflows_the_workspace(place, size):
    sizes = [1, 1, 1, 1]
    sizes[place] = size
    for of in ("", "backward", "sum"):
        with pytest.raises(ValueError, match=rf"expected [01] to 2147483647, got {size}"):
            _C.target_logprob_workspace_bytes(False, sizes, True, 0, 1, of)
    with pytest.raises(ValueError, match="elements of hidden: expected 0 to"):
        _C.target_logprob_workspace_bytes(False, [2**31 - 1, 2**31 - 1, 1, 1], True, 0, 1, "backward")


@pytest.mark.parametrize("entry", [_C.trie_attention, _C.target_logprob])
def test_what_is_no_tensor_is_refused(entry):
    good = ATTENTION if entry is _C.trie_attention else HEAD
    for name in [name for name, value in good.items() if isinstance(value, torch.Tensor)]:
        for value in (None, 0, 2**40, [0.0], good[name].numpy()):
            if value is None and name in ("sinks", "bias"):
                continue
            with pytest.raises(TypeError):
                call(entry, good | {name: value})


def test_a_stride_of_a_single_element_is_never_taken():
    """torch and numpy let it be anything, and the addresses it would lead to be anywhere."""
    weight = torch.ones(64).as_strided((1, 64), (2**60, 1))
    logp, *_ = ops.target_logprob(torch.ones(3, 64), weight, *[torch.zeros(1, dtype=torch.int32)] * 2)
    assert logp.tolist() == [0.0]
    index = torch.zeros(1, dtype=torch.int32)
    q = torch.ones(8).as_strided((1, 1, 8), (2**60, 2**59, 1))
    tree = ops.TreeIndex(index, index + 1, index, index)
    assert ops.trie_attention(q, q, q, tree).tolist() == [[[1.0] * 8]]


@pytest.mark.parametrize("name", ["depth_q", "depth_k"])
def test_depths_whose_differences_would_overflow_are_refused(name):
    depths = full(len(ATTENTION[name]), -1)
    call(_C.trie_attention, ATTENTION | {name: depths})  # not read without a window
    with pytest.raises(ValueError, match=f"{name}: expected 0 to 2147483647, got -1"):
        call(_C.trie_attention, ATTENTION | {name: depths, "window": 3})


@pytest.mark.parametrize("end", [-(2**31), -1, 0, 6, 7, 8, 2**31 - 1])
@pytest.mark.parametrize("row", [-(2**31), -1, 0, 6, 7, 2**31 - 1])
def test_rows_and_ends_of_any_value_are_compared_only(end, row):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(7, 1, 4, generator=generator)
    q, end_k = torch.randn(2, 1, 4, generator=generator), torch.full((7,), end, dtype=torch.int32)
    row_q, depth = torch.tensor([row, 3], dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    tree = ops.TreeIndex(row_q, end_k, depth[:2], depth)
    results = [ops.trie_attention(*(x.to(dtype) for x in (q, k, k)), tree) for dtype in (torch.float32, torch.float64)]
    torch.testing.assert_close(results[0].double(), results[1])


INDEX = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(5, 4), torch.zeros(0, 4), INDEX, INDEX, None),
        (torch.zeros(5, 4), torch.zeros(7, 4, dtype=torch.float64), INDEX, INDEX, None),
        (torch.zeros(5, 4), torch.zeros(7, 3), INDEX, INDEX, None),
        (torch.zeros(5, 4), torch.zeros(7, 4), INDEX.long(), INDEX, None),
        (torch.zeros(5, 4), torch.zeros(7, 4), INDEX, INDEX[:2], None),
        (torch.zeros(5, 4), torch.zeros(7, 4), INDEX, INDEX, torch.zeros(6)),
    ],
)
def test_ops_called_without_their_facade_refuse_too(arguments):
    with pytest.raises(ValueError, match="expected"):
        torch.ops.icl_ft_fast.target_logprob(*arguments, 1.0, 0.0)


def test_the_backward_refuses_rows_out_of_range():
    hidden, weight = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    for row in (2, -3):
        logp, *_ = ops.target_logprob(hidden, weight, torch.tensor([row]), torch.tensor([0]))
        with pytest.raises(ValueError, match=f"row: expected 0 to 1, got {row}"):
            logp.sum().backward()
    logp, *_ = ops.target_logprob(hidden, weight, torch.tensor([0, 1]), torch.tensor([3, -1]))
    logp[0].backward()  # a target out of range is nobody's: its row's softmax is pushed down all the same
    assert hidden.grad.isfinite().all()


def test_every_entry_point_is_in_this_file_or_in_the_trie_s():
    tested = {"trie_attention", "trie_attention_backward", "target_logprob", "target_logprob_backward"}
    tested |= {"target_logprob_sum", "linear"}  # the latter in tests/test_linear.py
    tested |= {"target_logprob_workspace_bytes", "best_isa", "sleep_at_barriers"}  # the last two follow no array
    trie = {"trie_build", "trie_ancestors"}  # tests/test_trie.py
    entries = {name for name, value in vars(_C).items() if inspect.isroutine(value) and name[0] != "_"}
    assert entries == tested | trie
