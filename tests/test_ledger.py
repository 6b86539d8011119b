"""The ledger: what each phase computed, against what torch counts; meters and the machine."""

import contextlib
import json
import mmap
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.ledger import COUNTS, HOW, Ledger, Phase
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.machine import ceilings, fingerprint
from icl_ft_fast.engine.meters import Meter, Reading
from icl_ft_fast.engine.score import score
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.tasks.task import Question

TOKENS = 20


def counted(network, *, train=False):
    """FLOPs of plain matrix products and of batched ones (attention), as torch counts a forward of TOKENS tokens."""
    ids = torch.arange(TOKENS)[None] + 5
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = network(ids, use_cache=False).logits
        if train:
            logits.sum().backward()
    by_op = counter.get_flop_counts()["Global"]
    batched = sum(flops for op, flops in by_op.items() if "bmm" in str(op) or "grouped" in str(op))
    return sum(by_op.values()) - batched, batched


FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_what_torch_counts(family, tiny_network, tokenizer):
    network = tiny_network(family, **FAMILIES[family])
    products, attention = counted(network)
    model = from_network(tiny_network(family, **FAMILIES[family]), tokenizer, family)
    work = work_of(model)
    without_attention = replace(work, attention=())
    depths = torch.arange(TOKENS, dtype=torch.int32)
    # rotary frequencies are a batched product too, of the shape [D / 2, 1] x [1, T]
    rotary = 0 if family == "gpt2" else TOKENS * network.config.head_dim
    assert without_attention.flops(depths, TOKENS) == products
    # eager attention computes all T x T pairs, the trie's only those that are visible: depth + 1, or the window
    full = sum(TOKENS * TOKENS * flops for _, flops in work.attention)
    assert attention - full in (0, rotary)
    seen = sum(flops * sum(min(d + 1, window or TOKENS) for d in range(TOKENS)) for window, flops in work.attention)
    assert work.flops(depths, 0) == without_attention.flops(depths, 0) + seen
    if "sliding_window" in FAMILIES[family]:
        assert 8 in [window for window, _ in work.attention]
    assert work.weight_bytes == 4 * model.num_parameters


def test_a_training_step_is_three_forwards(tiny_network, tokenizer):
    network = tiny_network("llama")
    work = work_of(from_network(tiny_network("llama"), tokenizer, "llama"))
    assert counted(network, train=True)[0] == 3 * replace(work, attention=()).flops(torch.arange(TOKENS), TOKENS)


def test_experts_count_as_those_that_a_row_is_sent_to(tiny_network, tokenizer):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = from_network(tiny_network("mixtral", **settings), tokenizer, "mixtral")
    all_of_them = replace_experts(tiny_network, tokenizer, settings | {"num_experts_per_tok": 4})
    expert = 3 * 32 * 64  # gate, up and down of the tiny network
    assert all_of_them - work_of(model).row_flops == 2 * 2 * expert * 4  # two experts fewer, in four layers


def replace_experts(tiny_network, tokenizer, settings):
    return work_of(from_network(tiny_network("mixtral", **settings), tokenizer, "mixtral")).row_flops


def test_phases_add_up_and_do_not_overlap():
    ledger = Ledger(forwarded_tokens=5)
    with ledger.phase("outer"):
        ledger.forwarded_tokens += 1
        with ledger.phase("inner"):
            ledger.forwarded_tokens += 10
            ledger.flops += 7
        ledger.forwarded_tokens += 100
        with contextlib.suppress(KeyError), ledger.phase("inner"):
            ledger.forwarded_tokens += 1000
            raise KeyError
    ledger.forwarded_tokens += 10_000
    assert {name: phase.forwarded_tokens for name, phase in ledger.phases.items()} == {"inner": 1010, "outer": 101}
    assert ledger.phases["inner"].flops == 7
    assert ledger.forwarded_tokens == 11_116
    assert all(seconds > 0 for seconds in ledger.seconds.values())


class Told:
    """A meter that reads what it is told."""

    def __init__(self, readings):
        self.readings = iter(readings)

    def read(self):
        return next(self.readings)


def test_a_phase_is_the_difference_of_two_readings():
    readings = [
        Reading(1.0, 10.0, 100.0, 1000, 1000),
        Reading(3.0, 13.0, 140.0, 1500, 5000),
        Reading(4.0, 20.0, 200.0, 1500, 1500),
        Reading(4.5, 20.5, 201.0, 1500, 2500),
    ]
    ledger = Ledger(meter=Told(readings))
    for kv_bytes in (600, 0):
        with ledger.phase("p"):
            ledger.kv_bytes += kv_bytes
    phase = ledger.phases["p"]
    assert (phase.wall_s, phase.device_s, phase.joules) == (2.5, 3.5, 41.0)
    assert phase.activation_bytes == 5000 - 1000 - 600  # the larger of the two rises
    assert set(ledger.as_dict()["phases"]["p"]["how"].values()) == {"measured", "estimated"}


def test_what_cannot_be_read_is_unavailable():
    ledger = Ledger()
    with ledger.phase("p"):
        pass
    how = ledger.phases["p"].how()
    assert {name for name, label in how.items() if label == "unavailable"} == {"device_s", "joules", "activation_bytes"}
    assert how.keys() == HOW.keys() == Phase.__dataclass_fields__.keys()
    assert set(COUNTS) < Ledger.__dataclass_fields__.keys()
    json.dumps(ledger.as_dict(), allow_nan=False)


def test_scoring_books_the_shared_rows_as_prefill(llama):
    context, ledger = list(range(5, 65)), Ledger()
    requests = [([*context, t], [t, 9]) for t in (10, 11, 12)]
    results = loglikelihood(llama, requests, shared_tokens=60, chunk_tokens=16, ledger=ledger)
    plain = loglikelihood(llama, requests)
    assert [r.logp for r in results] == pytest.approx([r.logp for r in plain], abs=1e-5)
    prefill, query = ledger.phases["prefill"], ledger.phases["query"]
    assert (prefill.forwarded_tokens, query.forwarded_tokens, query.scored_tokens) == (60, 6, 6)
    work = work_of(llama)
    assert prefill.flops == work.flops(torch.arange(60), 0)
    assert query.flops == work.flops(torch.tensor([60, 61] * 3), 6)
    chunks = [(0, 16), (16, 16), (32, 16), (48, 12), (60, 6)]  # rows on the cache before, and of the chunk
    assert ledger.moved_bytes == sum(work.weight_bytes + (s + n) * work.kv_row_bytes for s, n in chunks)
    assert ledger.kv_bytes == 66 * work.kv_row_bytes
    assert ledger.flops == prefill.flops + query.flops
    apart = Ledger()
    loglikelihood(llama, [([5, 6], [7]), ([8], [9])], shared_tokens=2, ledger=apart)  # nothing is shared after all
    assert apart.phases.keys() == {"query"}


def test_questions_after_a_context_have_a_prefill(llama):
    ledger = Ledger()
    questions = [Question("a", "the cat", (" sat", " on")), Question("b", "who", (" knows", " why"))]
    score(llama, questions, context="the mat the mat the mat ", ledger=ledger)
    assert ledger.phases.keys() == {"tokenise", "prefill", "query"}
    assert ledger.phases["prefill"].forwarded_tokens == len(llama.tokenizer("the mat the mat the mat")["input_ids"])


def test_generation_and_training_book_their_phases(llama):
    ledger = Ledger()
    generate(llama, ["the cat", "the mat sat"], Sampling(max_new_tokens=3), ledger=ledger)
    finetune(llama, ["the cat sat"], FinetuneSettings(steps=2, batch_size=1), ledger=ledger)
    work, rows = work_of(llama), ledger.phases["train"].trained_tokens
    assert ledger.phases.keys() == {"generate", "train"}
    assert ledger.phases["train"].flops == 3 * 2 * work.flops(torch.arange(rows // 2), rows // 2)
    wanted = ledger.phases["generate"]
    assert wanted.decoded_tokens == ledger.decoded_tokens > 0
    assert wanted.flops > wanted.forwarded_tokens * work.row_flops + wanted.decoded_tokens * work.head_flops


def test_processors_energy_counters(tmp_path):
    counter = tmp_path / "intel-rapl:0"
    counter.mkdir()
    (counter / "max_energy_range_uj").write_text("10000000\n")
    (counter / "energy_uj").write_text("9000000\n")
    meter = Meter(rapl=tmp_path)
    start = meter.read().joules
    (counter / "energy_uj").write_text("9500000\n")
    assert meter.read().joules - start == pytest.approx(0.5)
    (counter / "energy_uj").write_text("200000\n")  # the counter began again at its range
    assert meter.read().joules - start == pytest.approx(1.2)
    assert Meter(rapl=tmp_path / "none").read().joules is None


def test_the_meter_of_this_machine():
    meter = Meter()
    before = meter.read()
    with mmap.mmap(-1, 32 * 2**20) as block:  # an allocator may answer from memory that the process already has
        block.write(b"\1" * len(block))
        after = meter.read()
    assert after.wall_s > before.wall_s
    assert after.device_s >= before.device_s
    if after.peak_bytes is not None:
        assert after.peak_bytes - before.bytes > 30 * 2**20


def test_the_machine():
    machine = fingerprint("cpu")
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["memory_bytes"] > 2**28
    assert machine["processor"]
    best = ceilings("cpu", torch.float32, seconds=0.0)
    assert (best.dtype, best.flops_per_s > 1e8, best.bytes_per_s > 1e7) == ("float32", True, True)


def test_work_of_a_window_counts_its_keys():
    work = Work(row_flops=0, head_flops=0, attention=((None, 1), (4, 10)), weight_bytes=0, kv_row_bytes=0)
    assert work.flops(torch.tensor([0, 3, 9]), 0) == (1 + 4 + 10) + 10 * (1 + 4 + 4)
