"""Context distillation: its loss against a dense KL, what it teaches, and how little it holds."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tokenizer_kinds
import torch
import torch.nn.functional as F

from icl_ft_fast import ops
from icl_ft_fast.engine import encoding, memory
from icl_ft_fast.engine.model import Head
from icl_ft_fast.finetuning import distillation
from icl_ft_fast.finetuning.data import Example, encode
from icl_ft_fast.finetuning.network import Objective
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, RunOptions

CONTEXT = "Documents:\n- the cat sat on that mat.\n- who knows why.\n\n"
TEXTS = [
    Example(" sat on that mat.", "the cat"),
    Example(" knows why.", "who"),
    Example(" sat.", "the cat"),
    "who sat?",
]
SETTINGS = FinetuneSettings(
    steps=1, batch_size=4, learning_rate=1.0, warmup_steps=0, clip_norm=math.inf, completion_only=True
)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5, "bias": True}])
def test_divergence_and_its_gradients(options, monkeypatch):
    monkeypatch.setattr(distillation, "_LOGITS", 3 * 40)  # blocks of three rows
    generator = torch.Generator().manual_seed(0)
    hidden, given, weight, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(n in (0, 2))
        for n, shape in enumerate(((11, 6), (11, 6), (40, 6), (40, 6)))
    )
    bias = torch.randn(40, generator=generator, dtype=torch.float64, requires_grad=True) if "bias" in options else None
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    teacher = distillation.Teacher(Head(other, None, scale, softcap), list(given.split([4, 0, 7])))
    held = []
    monkeypatch.setattr(F, "kl_div", lambda a, b, kl=F.kl_div, **options: held.append(a.numel()) or kl(a, b, **options))
    found = teacher.divergence(hidden, Head(weight, bias, scale, softcap), [0, 1, 2])
    leaves = [hidden, weight] + ([bias] if bias is not None else [])
    grads = torch.autograd.grad(found, leaves)
    assert max(held) == 120
    assert len(held) == 8  # four blocks, each once more in the backward

    def logp(h, w, b):
        logits = (h @ w.T + (0 if b is None else b)) * scale
        return (softcap * torch.tanh(logits / softcap) if softcap else logits).log_softmax(-1)

    p = logp(given, other, None)
    exact = (p.exp() * (p - logp(hidden, weight, bias))).sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    for grad, exact_grad in zip(grads, torch.autograd.grad(exact, leaves), strict=True):
        assert (grad - exact_grad).abs().max() < 1e-5 * exact_grad.abs().max()


def test_gradients_are_those_of_plain_forwards(llama, plain_llama, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    tuned = finetune(llama, TEXTS, SETTINGS, teacher_context=CONTEXT)
    student, teacher = copy.deepcopy(plain_llama).double(), copy.deepcopy(plain_llama).double()
    before = [0, *llama.tokenizer(CONTEXT.rstrip(), add_special_tokens=False)["input_ids"]]
    losses, count = [], 0
    for tokens in encode(llama.tokenizer, TEXTS, 256, completion_only=True):
        own, keep = tokens.ids[1:], torch.tensor(tokens.is_target[1:])
        mine = student(torch.tensor([tokens.ids[:-1]])).logits[0].log_softmax(-1)[keep]
        with torch.no_grad():
            p = teacher(torch.tensor([[*before, *own[:-1]]])).logits[0, len(before) - 1 :].log_softmax(-1)[keep]
        losses.append((p.exp() * (p - mine)).sum())
        count += int(keep.sum())
    loss = sum(losses) / count
    assert tuned.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    after = dict(tuned.model.network.named_parameters())
    for name, parameter in student.named_parameters():
        moved = (llama.network.get_parameter(name) - after[name]).detach()
        assert (moved - parameter.grad).abs().max() < 1e-5, name


def test_gradients_of_targets_that_share_rows_have_the_same_bits_every_time():
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    hidden, scale = torch.randn(50, 576, generator=draw, requires_grad=True), torch.randn(200, 576, generator=draw)
    row = torch.randint(0, 8, (200,), generator=draw)
    batch = SimpleNamespace(tree=None, head_row=torch.arange(50), row=row, target_index=torch.arange(200))
    model = SimpleNamespace(network=torch.nn.Identity(), head=None, forward_tree=lambda _: hidden)
    teacher = SimpleNamespace(divergence=lambda given, *_: (given * scale).sum())
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(Objective(model, teacher)(batch, [0]), hidden)[0] for _ in range(100)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, found[0]) for grad in found)


def test_the_divergence_falls(llama):
    settings = replace(SETTINGS, steps=60, learning_rate=1e-2, clip_norm=1.0, completion_only=False)
    tuned = finetune(llama, TEXTS, settings, teacher_context=CONTEXT)
    assert tuned.losses[-1] < tuned.losses[0] / 10


def test_what_a_teacher_cannot_read(llama):
    with pytest.raises(FinetuneError, match=r"^teacher: the context is empty: give it documents$"):
        finetune(llama, TEXTS, SETTINGS, teacher_context=" ")
    message = r"^teacher: its documents and the longest example are \d+ tokens over the model's 256 positions"
    with pytest.raises(FinetuneError, match=message):
        finetune(llama, TEXTS, SETTINGS, teacher_context="who knows über " * 99)
    with pytest.raises(FinetuneError, match=r"^in_place: a teacher must stay as it is$"):
        finetune(llama, TEXTS, SETTINGS, teacher_context=CONTEXT, options=RunOptions(in_place=True))


@pytest.mark.parametrize("how", ["a small memory", "a memory that runs out"])
def test_the_teacher_reads_in_smaller_chunks_where_memory_asks_for_it(how, llama, monkeypatch, caplog):
    examples = encode(llama.tokenizer, TEXTS, llama.max_positions)
    expected = distillation.read_in_context(llama, examples, CONTEXT)
    attention = ops.trie_attention

    def failing(q, *rest, **options):
        if how == "a memory that runs out" and len(q) > 8:
            raise MemoryError
        return attention(q, *rest, **options)

    model = llama
    if how == "a small memory":
        needs, fit = [], memory.fit
        monkeypatch.setattr(memory, "held_bytes", lambda _: 0)
        monkeypatch.setattr(memory, "fit", lambda *a, **k: needs.append(fit(*a, **k)) or needs[-1])
        distillation.read_in_context(llama, examples, CONTEXT)
        model = replace(llama, memory=memory.Memory(needs[0][1].total_bytes - 1))
        distillation.read_in_context(model, examples, CONTEXT)  # measures what a row takes
    monkeypatch.setattr(ops, "trie_attention", failing)
    got = distillation.read_in_context(model, examples, CONTEXT)
    for one, other in zip(got.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert ("ran out" in caplog.text) == (how == "a memory that runs out")
    assert how == "a memory that runs out" or needs[-1][0] < needs[0][0]


@pytest.mark.parametrize("kind", ["llama 3", "qwen", "smollm"])
def test_a_teacher_reads_a_chat_as_its_template_writes_it(kind, monkeypatch):
    tokenizer, read = tokenizer_kinds.make(kind), []
    monkeypatch.setattr(distillation.trie, "build_from_lists", lambda requests: read.extend(requests) or 1 / 0)
    model = SimpleNamespace(tokenizer=tokenizer, max_positions=10_000)
    (chat,) = encode(tokenizer, [Example(turns=(("user", "who?"), ("assistant", "me")))], 10_000)
    with pytest.raises(ZeroDivisionError):
        distillation.read_in_context(model, [chat], "the fox.")
    ((before, own),) = read
    (context,) = encoding.encode(tokenizer, ["the fox."])
    assert before + own == context + chat.ids[int(kind == "llama 3") :]  # whose BOS the context has
    assert own == chat.ids[1:]
