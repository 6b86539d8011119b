"""Determinism: a command's bytes in fresh processes, and scores of invariant models to the bit in any company."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast import _C
from icl_ft_fast.cli import main
from icl_ft_fast.engine.contexts import ContextError, load_context, save_context
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.likelihood import ScoringOptions, iter_token_logprobs, loglikelihood, prefill
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.model import ModelError
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.ops import cpu
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.task import Document, Question, Task

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "llama": {"num_hidden_layers": 2},
    "gemma2": {
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
ISAS = range(1, _C.best_isa() + 1)
RNG = random.Random(0)
CONTEXT = [0, *RNG.choices(range(2, 300), k=129)]  # longer than a group of attention's sums
# Some begin with the context, or with a part of it, or with nothing in common, and some with one another.
REQUESTS = [
    (CONTEXT[:length] + RNG.choices(range(2, 300), k=RNG.randint(1, 30)), RNG.choices(range(2, 300), k=continuation))
    for length in (0, 0, 50, *[len(CONTEXT)] * 6)
    for continuation in (1, 4)
]
REQUESTS += [(REQUESTS[-1][0] + REQUESTS[-1][1], [7]), (CONTEXT[:20], CONTEXT[20:]), (CONTEXT, [9])]
WITH_CONTEXT = [r for r, (context, _) in enumerate(REQUESTS) if context[: len(CONTEXT)] == CONTEXT]


@pytest.fixture(scope="module", params=[(f, d) for f in FAMILIES for d in ("float32", "bfloat16")], ids=str)
def model(request, tiny_network):
    family, dtype = request.param
    network = tiny_network(family, **FAMILIES[family]).to(getattr(torch, dtype))
    return from_network(network, None, family, batch_invariant=True)


@pytest.fixture(scope="module")
def alone(model):
    """A function from a request's index, threads and instruction set to its score when nothing else is asked."""

    @cache
    def score(r, threads, isa):
        return loglikelihood(model, [REQUESTS[r]])[0]

    return score


@settings(max_examples=20, deadline=None)
@given(
    chosen=st.permutations(range(len(REQUESTS))).flatmap(
        lambda order: st.integers(1, len(order)).map(lambda n: order[:n])
    ),
    chunk_tokens=st.sampled_from([16, 100, 128, 512]),
    start=st.sampled_from([None, "read", "near another", "saved"]),
    threads=st.sampled_from([1, 2]),
    isa=st.sampled_from(ISAS),
)
def test_a_score_has_the_same_bits_in_any_company(
    model, alone, tmp_path_factory, chosen, chunk_tokens, start, threads, isa
):
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_ISA", isa)
        torch.set_num_threads(threads)
        try:
            context = None
            if start is not None:
                chosen = [r for r in chosen if r in WITH_CONTEXT] or WITH_CONTEXT[:2]
                near = (
                    prefill(model, CONTEXT[:60] + [5], chunk_tokens=chunk_tokens) if start == "near another" else None
                )
                context = prefill(model, CONTEXT, reuse_from=near, chunk_tokens=chunk_tokens)
                if start == "saved":
                    path = tmp_path_factory.mktemp("contexts") / "one.safetensors"
                    save_context(path, model, context, fingerprint="tiny")
                    context = load_context(path, model, fingerprint="tiny")
            got = loglikelihood(model, [REQUESTS[r] for r in chosen], chunk_tokens=chunk_tokens, start=context)
            assert got == [alone(r, threads, isa) for r in chosen]
        finally:
            torch.set_num_threads(before)


def test_tokens_have_the_same_bits_in_any_company(model):
    together = dict(iter_token_logprobs(model, REQUESTS, top=3, options=ScoringOptions(100)))
    for r in (0, 5, len(REQUESTS) - 2):
        assert list(iter_token_logprobs(model, [REQUESTS[r]], top=3)) == [(0, together[r])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_has_the_same_bits_in_any_company(tiny_network, tokenizer, temperature):
    model = from_network(tiny_network("gemma2", **FAMILIES["gemma2"]), tokenizer, "gemma2", batch_invariant=True)
    prompts, sampling = [context for context, _ in REQUESTS[::2]], Sampling(12, temperature=temperature, seed=1)
    assert generate(model, prompts, sampling)[:3] == [generate(model, [p], sampling)[0] for p in prompts[:3]]


def test_scores_are_those_of_any_model(tiny_network, plain):
    """Exact as every other path: against one plain forward for each request."""
    model = from_network(tiny_network("llama"), None, "llama", batch_invariant=True)
    for request, got in zip(REQUESTS, loglikelihood(model, REQUESTS), strict=True):
        logp, is_greedy = plain(tiny_network("llama"), *request)
        assert got.logp == pytest.approx(logp.sum().item(), rel=0, abs=1e-4)
        assert got.is_greedy == is_greedy


def test_contexts_of_other_models_have_other_bits_and_are_refused(llama, llama_directory, tmp_path):
    path = tmp_path / "one.safetensors"
    save_context(path, llama, prefill(llama, CONTEXT))
    with pytest.raises(ContextError, match="saved from"):
        load_context(path, load(llama_directory, batch_invariant=True))


def test_a_trained_model_stays_invariant(llama_directory):
    model = load(llama_directory, batch_invariant=True)
    trained = finetune(model, ["the cat sat."], FinetuneSettings(steps=1), seed=0).model
    together = loglikelihood(trained, REQUESTS, chunk_tokens=100)
    assert loglikelihood(trained, REQUESTS[4:5]) == together[4:5]


@pytest.mark.parametrize("depends_on", ["place", "neighbours"])
def test_a_network_whose_bits_move_is_refused(depends_on, tiny_network):
    network = tiny_network("llama")
    rounding = torch.finfo(torch.float32).eps

    def off(module, inputs, output):
        noise = torch.arange(output.shape[1])[:, None] % 2 if depends_on == "place" else output.roll(1, 1) > 0
        return output * (1 + rounding * noise)

    network.model.layers[1].mlp.register_forward_hook(off)
    with pytest.raises(
        ModelError, match=r"^here: batch_invariant: with \d+ threads of torch .* depend on its place in a block"
    ):
        from_network(network, None, "here", batch_invariant=True)


def test_what_cannot_be_invariant_is_refused(tiny_network):
    experts = tiny_network("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ModelError, match=r"^here: batch_invariant: not for a mixture of experts \(num_.* = \d\)"):
        from_network(experts, None, "here", batch_invariant=True)
    with pytest.raises(ModelError, match=r"^here: batch_invariant: not on meta: "):
        from_network(tiny_network("llama").to("meta"), None, "here", batch_invariant=True)


QUESTIONS = [
    Question(f"q{n}", f"{who} sat", (" on the mat", " near", " on that cat. why"), n % 3)
    for n, who in enumerate(("the cat", "who", "that mat", "the cat knows why the mat"))
]
TASK = Task((Document("d1", "the cat sat on the mat."), Document("d2", "who knows why?")), tuple(QUESTIONS))


def test_commands_write_the_same_bytes_again(llama_directory, tmp_path):
    """Here and in a fresh process, in which strings hash differently."""
    TASK.write(tmp_path / "task")
    files = [f"--{name}={tmp_path}/task/{name}.jsonl" for name in ("documents", "questions")]
    common = ["--quiet", f"--model={llama_directory}"]
    study = [f"--task={tmp_path}/task", "--arms=base,icl,ft", "--steps=3", "--measure-seconds=0.1"]

    def commands(run):
        return [
            ["score", *common, *files, f"--out={tmp_path / run}/scores.jsonl"],
            ["compare", *common, *study, f"--out={tmp_path / run}"],
        ]

    assert not any(main(command) for command in commands("here"))
    code = f"from icl_ft_fast.cli import main; raise SystemExit(any(map(main, {commands('there')})))"
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "random"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "scores.jsonl").read_bytes() == (tmp_path / "there" / "scores.jsonl").read_bytes()
    one, two = (json.loads((tmp_path / run / "results.json").read_text())["runs"] for run in ("here", "there"))
    for run, again in zip(one, two, strict=True):
        assert all(run[name] == again[name] for name in ("answers", "losses", "notes"))


def test_a_question_has_the_same_line_beside_any_others(llama_directory, tmp_path):
    write_jsonl(tmp_path / "documents.jsonl", [{"id": "d", "text": "the cat sat on the mat. " * 20}])
    common = [
        "score",
        "--batch-invariant",
        "--quiet",
        f"--model={llama_directory}",
        f"--documents={tmp_path}/documents.jsonl",
    ]
    lines = []
    for name, questions, more in (
        ("all", QUESTIONS, [f"--store={tmp_path}/store", "--chunk-tokens=16"]),
        ("stored", QUESTIONS[::-1], [f"--store={tmp_path}/store", "--shard-tokens=20"]),
        ("one", QUESTIONS[2:3], []),
    ):
        write_jsonl(tmp_path / name, map(asdict, questions))
        assert main([*common, *more, f"--questions={tmp_path / name}", f"--out={tmp_path / name}.out"]) == 0
        lines.append({json.loads(x)["question_id"]: x for x in (tmp_path / f"{name}.out").read_text().splitlines()})
    assert lines[0] == lines[1]
    assert lines[0]["q2"] == lines[2]["q2"]


def test_the_page_s_example_runs(llama):
    text = (ROOT / "docs" / "determinism.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    class Iff:  # any model will do
        loglikelihood = staticmethod(loglikelihood)

        @staticmethod
        def load(name, *, batch_invariant):
            return from_network(llama.network, llama.tokenizer, name, batch_invariant=batch_invariant)

    exec(compile(code, "docs/determinism.md", "exec"), {"iff": Iff})
