"""Linear layers of few rows in C++: against float64, for every instruction set, and when they are taken."""

import pytest
import torch
from close import assert_close
from native import call

import icl_ft_fast as iff
from icl_ft_fast import _C, ops
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.ops import cpu

ISAS = {"portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}  # csrc/icl.h
# A register block and its rests in every direction, rows of no element, more elements than are multiplied at a time.
SIZES = [(2, 1, 1), (3, 7, 5), (5, 33, 9), (40, 64, 193), (7, 1030, 97), (4, 0, 3), (13, 2100, 17)]

NEEDS_VECTORS = pytest.mark.skipif(_C.best_isa() < ISAS["avx2"], reason="plain C++ is slower than torch's product")


@pytest.fixture(params=[name for name, isa in ISAS.items() if isa <= _C.best_isa()])
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu, "_ISA", ISAS[request.param])


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("R", "E", "V"), SIZES)
def test_every_instruction_set_multiplies_as_float64_does(R, E, V, dtype, isa):
    x, weight, bias = drawn(R, E, dtype=dtype), drawn(V, E, dtype=dtype), drawn(V, dtype=dtype)
    with torch.inference_mode():
        for b in (None, bias):
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_close(cpu.linear(x, weight, b), torch.nn.functional.linear(x, weight, b), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(dtype, isa):
    x, weight = drawn(11, 1100, dtype=dtype), drawn(50, 1100, dtype=dtype)
    together = cpu.linear(x, weight, None)
    for rows in (slice(0, 2), slice(3, 10), slice(4, 8)):
        assert torch.equal(cpu.linear(x[rows], weight, None), together[rows])


def test_rows_and_weights_may_lie_apart(isa):
    x, weight = drawn(6, 40)[::2, :30], drawn(20, 40)[:, 5:35]
    assert torch.equal(cpu.linear(x, weight, None), cpu.linear(x.contiguous(), weight.contiguous(), None))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros((3, 5), dtype=torch.float64), "x: expected float32"),
        ("x", torch.zeros((3, 10))[:, ::2], "x: expected rows of neighbouring elements"),
        ("weight", torch.zeros((4, 6)), "weight: expected 5 in dimension 1"),
        ("weight", torch.zeros((5, 4)).T, "weight: expected rows of neighbouring elements"),
        ("bias", torch.zeros(3), "bias: expected 4 in dimension 0"),
        ("isa", 9, "isa: expected 0 to"),
        ("out", torch.zeros((3, 5)), "out: expected 4 in dimension 1"),
    ],
)
def test_native_linear_refuses(name, value, message):
    sizes = {"x": (3, 5), "weight": (4, 5), "bias": (4,), "isa": None, "out": (3, 4)}
    good = {key: 0 if size is None else torch.zeros(size) for key, size in sizes.items()}
    call(_C.linear, good)
    with pytest.raises(ValueError, match=message):
        call(_C.linear, good | {name: value})


@pytest.fixture
def native(monkeypatch):
    """The rows of each product that C++ made."""
    rows, real = [], cpu.linear

    def counted(x, weight, bias):
        rows.append(len(x))
        return real(x, weight, bias)

    monkeypatch.setattr(cpu, "linear", counted)
    return rows


@NEEDS_VECTORS
def test_few_rows_without_gradients_go_to_native_code(native):
    weight, x = drawn(9, 8), drawn(2, 3, 8)
    with torch.inference_mode():
        assert ops.linear(x, weight).shape == (2, 3, 9)
        assert native == [6]
        for other in (drawn(1, 8), drawn(64, 8), x.double()):
            ops.linear(other, weight.to(other.dtype))
        ops.linear(x, drawn(8, 9).T)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    ops.linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None
    assert native == [6]


@NEEDS_VECTORS
def test_a_step_of_decoding_multiplies_every_weight_in_native_code(native, tiny_network, tokenizer):
    model = from_network(tiny_network("llama"), tokenizer, "llama")
    layers = [m for m in model.network.modules() if type(m) is torch.nn.Linear]
    del native[:]
    prompts, how = [[5, 6, 7], [5, 6, 8], [5, 9, 10]], iff.Sampling(max_new_tokens=4)
    made = iff.generate(model, prompts, how)
    assert native.count(3) == 3 * len(layers) + 1  # three steps; the head of the prompts before them
    del native[:]
    with torch.inference_mode():  # somebody's own forward stays transformers'
        model.network.set_attn_implementation("eager")
        for prompt, one in zip(prompts, made, strict=True):
            logits = model.network(torch.tensor([[*prompt, *one.ids[:-1]]]), use_cache=False).logits[0]
            assert tuple(logits[len(prompt) - 1 :].argmax(-1).tolist()) == one.ids
    assert native == []
