"""Parts of the bring-up that time a random 8B Llama: scoring, decoding and training, beside transformers."""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

import icl_ft_fast as iff
from benchmarks import score
from benchmarks.gpu.bench import LLAMA_8B, OURS, PER_MS, TOY, Bench, Variants, random_ids
from benchmarks.gpu.references import check_alike, check_logp, check_losses, plain
from benchmarks.timing import Row
from icl_ft_fast.engine import generate
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning import batches, lora, network
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings

CHUNK_TOKENS = 4096  # rows forwarded at a time; the package's own default is also measured
SWEEP = {True: (16, 64), False: (512, 2048, 8192, 16_384)}


def _model(bench: Bench) -> Model:
    """A random Llama of the 8B's shape whose texts never end."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TOY if bench.small else LLAMA_8B), bos_token_id=0, eos_token_id=1)
    with torch.device(bench.device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    network.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids: "")
    return from_network(network, tokenizer, "random 8B", self_check=False)


def _case(bench: Bench, context: list[int], prompts: list[list[int]], tokens: int) -> score.Case:
    """Four choices of so many tokens after each prompt over a context."""
    choices = [random_ids(bench, 1000 + p, [tokens] * 4) for p in range(len(prompts))]
    heads = [context + prompt for prompt in prompts]
    requests = [(head, choice) for head, its in zip(heads, choices, strict=True) for choice in its]
    return score.Case(_model(bench), "", [], requests, context, prompts, choices)


def _logp(case: score.Case, rows: int | None = CHUNK_TOKENS, ledger: iff.Ledger | None = None) -> list[float]:
    return [r.logp for r in iff.loglikelihood(case.model, case.requests, chunk_tokens=rows, ledger=ledger)]


def mmlu(bench: Bench) -> None:
    """Questions of 60 to 140 tokens behind 5 shots, 4 choices of a token: lm-eval does a forward a question."""
    subjects, shots, each, batch_sizes = (2, 40, 4, (2, 4)) if bench.small else (10, 700, 100, (16, 64))
    heads = random_ids(bench, 0, [shots] * subjects)
    own = random_ids(bench, 1, [60 + 7919 * i % 81 for i in range(subjects * each)])
    case = _case(bench, [], [heads[i // each] + question for i, question in enumerate(own)], 1)
    sample, ledger = case.prompts[: max(batch_sizes)], iff.Ledger()
    ours = _logp(case, ledger=ledger)

    @torch.inference_mode()
    def forwards(size: int) -> list[float]:
        logp: dict[int, list[float]] = {}
        longest_first = sorted(range(len(sample)), key=lambda i: -len(sample[i]))
        with plain(case.model) as network:
            for part in (longest_first[i : i + size] for i in range(0, len(sample), size)):
                width = len(sample[part[0]])  # padded on the right, which nobody sees
                ids = torch.tensor([sample[i] + [0] * (width - len(sample[i])) for i in part], device=bench.device)
                logits = network(ids, use_cache=False).logits.log_softmax(-1)
                for of, i in zip(logits, part, strict=True):
                    logp[i] = of[len(sample[i]) - 1, [token for (token,) in case.choices[i]]].tolist()
        return [x for i in range(len(sample)) for x in logp[i]]

    bench.check("MMLU-like", check_logp, "MMLU-like", ours, forwards(batch_sizes[0]))
    rivals = {f"hf as lm-eval, batch {size}": functools.partial(forwards, size) for size in batch_sizes}
    variants: Variants = {
        OURS: functools.partial(_logp, case),
        f"{OURS}, the default": functools.partial(_logp, case, None),
        **{f"{OURS}, chunks of {rows:,}": functools.partial(_logp, case, rows) for rows in SWEEP[bench.small]},
        "floor": score.floor(case, CHUNK_TOKENS),
        f"floor, chunks of {SWEEP[bench.small][0]:,}": score.floor(case, SWEEP[bench.small][0]),
        **rivals,
    }
    name = f"MMLU-like: {subjects} x {each:,} questions x 4 behind {shots} tokens"
    share = dict.fromkeys(rivals, len(sample) / len(case.prompts))
    bench.measure(name, variants, ledger.flops, "TFLOP/s", sample=share, rounds=1, seconds=0)
    _profile(bench, case)


def _profile(bench: Bench, case: score.Case) -> None:
    """What a run of few chunks spends its time on, in profile.txt; how much of it the device is idle; its waits."""
    some = replace(case, requests=case.requests[: len(case.requests) // 4])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiled:
        began = time.perf_counter()
        _logp(some, None)
        bench.synchronize()
        ms = (time.perf_counter() - began) * 1e3
    by = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    events = profiled.key_averages()
    (bench.out / "profile.txt").write_text(events.table(sort_by=by, row_limit=15, max_name_column_width=80))
    busy_ms = sum(getattr(event, by) for event in events) / 1e3
    case_name = "profile: a quarter of the MMLU-like requests"
    bench.tell(Row("gpu", case_name, OURS, ms, ms, ms, max(0.0, 100 * (1 - busy_ms / ms)), "% idle"))
    if bench.cuda:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            _logp(some, None)
            torch.cuda.set_sync_debug_mode("default")
        bench.tell(Row("gpu", case_name, f"{OURS}, waits for copies", ms, ms, ms, float(len(waits)), "waits"))


def long_context(bench: Bench) -> None:
    """1,000 questions x 4 choices of 5 tokens over 32k tokens, and the loop that expands the context's cache."""
    length, questions, sample = (64, 4, 2) if bench.small else (32_768, 1000, 8)
    context, *prompts = random_ids(bench, 0, [length, *[20] * questions])
    case, ledger = _case(bench, context, prompts, 5), iff.Ledger()
    ours = _logp(case, ledger=ledger)
    variants: Variants = {OURS: functools.partial(_logp, case), "floor": score.floor(case, CHUNK_TOKENS)}
    name = f"long context: {questions:,} questions x 4 over {length:,} tokens"
    found = bench.measure(name, variants, ledger.flops, "TFLOP/s", rounds=2, seconds=0)
    peer = score.kv_loop(case, sample, chunk_tokens=CHUNK_TOKENS)
    bench.check(name, check_logp, name, ours, [x for its in peer.logp for x in its])
    ms = 1e3 * (peer.once + statistics.median(peer.seconds) * questions)
    rate = ledger.flops / ms * PER_MS["TFLOP/s"]
    made = found.get(OURS) or Row("gpu", name, OURS, ms, ms, ms, rate, "TFLOP/s")
    bench.tell(replace(made, variant="KV loop", ms=ms, p20_ms=ms, p80_ms=ms, rate=rate, peak_percent=None))


def decode(bench: Bench) -> None:
    """256 prompts over 8k tokens, greedily; what a run takes beyond its first token is its steps."""
    length, prompts, new, sample = (48, 6, 3, 2) if bench.small else (8192, 256, 33, 8)
    context, *tails = random_ids(bench, 0, [length, *[20] * prompts])
    model, given = _model(bench), [context + tail for tail in tails]

    def ours(running: int, tokens: int) -> list[tuple[int, ...]]:
        with mock.patch.object(generate, "RUNNING", running):
            return [g.ids for g in generate.generate(model, given, generate.Sampling(tokens))]

    @torch.inference_mode()
    def theirs(tokens: int) -> list[tuple[int, ...]]:
        ids, limits = torch.tensor(given[:sample], device=bench.device), {"max_new_tokens": tokens, "pad_token_id": 0}
        with plain(model) as network:
            out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        return [tuple(row[ids.shape[1] :].tolist()) for row in out]

    alike = [a == b for a, b in zip(ours(prompts, 1), theirs(1), strict=False)]
    bench.check("decode", check_alike, alike)
    name, share = f"{prompts} prompts over {length:,} tokens", {"transformers": sample / prompts}
    ms: list[dict[str, Row]] = []
    for tokens, case in ((1, f"first token: {name}"), (new, f"decode: {new} tokens, {name}")):
        variants: Variants = {OURS: functools.partial(ours, prompts, tokens)}
        variants |= {f"{OURS}, default": functools.partial(ours, generate.RUNNING, tokens)} if tokens > 1 else {}
        variants["transformers"] = functools.partial(theirs, tokens)
        ms.append(bench.measure(case, variants, prompts * tokens, "tokens/s", sample=share, rounds=2, seconds=0))
    weights = sum(p.nbytes for p in model.network.parameters())
    steps = (new - 1) * len(given)
    for by, together in ((OURS, prompts), ("transformers", sample)):
        if not all(by in rows for rows in ms):
            continue
        step_ms = max(1e-3, ms[1][by].ms - ms[0][by].ms) * together / steps
        rate = weights / step_ms * PER_MS["GB/s"]
        bench.tell(
            Row(
                "gpu",
                f"step: of {name}",
                f"{by}, {together} at a time",
                step_ms,
                step_ms,
                step_ms,
                rate,
                "GB/s",
                bench.percent(rate, "GB/s"),
            )
        )


def lora_step(bench: Bench) -> None:
    """A LoRA step on 8 texts of 1,024 tokens: packed rows, and for transformers the batch that they are."""
    texts, length = (2, 16) if bench.small else (8, 1024)
    model, settings = _model(bench), FinetuneSettings(lora=LoraSettings(), gradient_checkpointing=True)
    is_target = [False] + [True] * (length - 1)
    examples = [EncodedExample(ids, is_target, i) for i, ids in enumerate(random_ids(bench, 0, [length] * texts))]
    adapted = lora.inject(model.network, settings.lora, 0)
    optimizer, objective = Optimizer(model.network, settings), network.Objective(model, None)
    losses: dict[str, float] = {}

    def ours() -> Tensor:
        return objective(batches.pack(examples), range(texts)) / (texts * (length - 1))

    def theirs() -> Tensor:
        ids = torch.tensor([example.ids for example in examples], device=bench.device)
        loss: Tensor = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def step(name: str, objective: Callable[[], Tensor]) -> None:
        with nullcontext() if name == OURS else plain(model):  # in the backward layers are run again
            loss = objective()
            loss.backward()
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(0.0)  # so that both see the same weights at every step
        losses[name] = loss.item()

    calls = {OURS: ours, "transformers, SDPA": theirs}
    variants: Variants = {name: functools.partial(step, name, call) for name, call in calls.items()}
    with network.recomputing(model.network, settings.gradient_checkpointing):  # both keep a layer's input only
        name = f"LoRA step: {texts} x {length:,} tokens"
        bench.measure(name, variants, texts * length, "tokens/s", rounds=3, seconds=0, peak=True)
    bench.check(name, check_losses, losses)
