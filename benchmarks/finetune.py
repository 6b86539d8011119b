"""Fine-tuning steps and their memory, beside TRL's SFTTrainer on the same examples in the same order.

Models are random Llamas; the documents are 200 statements of simple-reversals, and 200 articles of semantic-structure.
Losses of both are compared before anything is reported. TRL runs with its own defaults, under which it too takes the
head in chunks of rows.
"""

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.score import SIZES, make_tokenizer
from benchmarks.timing import Row, peak_bytes
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.finetuning import batches
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, RunOptions
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.semantic import semantic_structure

BATCH = 8
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def run(quick: bool) -> list[Row]:
    """Step time of a 30M model, and memory of one with a vocabulary of 128,000."""
    texts = [document.text for document in simple_reversals(0, num_facts=20, num_articles=10).documents]
    articles = [document.text for document in semantic_structure(0).documents][:200]
    steps, rounds = (2, 1) if quick else (12, 3)
    narrow = NARROW | {"vocab_size": 8_000 if quick else 128_000}
    return [
        *_steps("30M, statements", SIZES["30M"], texts, steps, rounds),
        *_steps("30M, articles", SIZES["30M"], articles, steps, rounds),
        *_memory(f"a vocabulary of {narrow['vocab_size']:,}, 4 layers of 256", narrow, articles, 2),
    ]


class _Case:
    """One model, examples in the order both take them, and both ways to train on them."""

    def __init__(self, size: dict[str, Any], texts: list[str], steps: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(**size, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1)
        self._network, self._steps = LlamaForCausalLM(config), steps
        self._weights = {name: tensor.clone() for name, tensor in self._network.state_dict().items()}
        self._tokenizer, self._texts = make_tokenizer(texts), texts
        examples = encode(self._tokenizer, texts, 4096)
        self.lengths = [len(example.ids) for example in examples]
        taken = itertools.islice(batches.order(examples, 0), BATCH * steps)
        self._taken = ["<s>" + texts[i] for i in taken]  # the tokenizer adds no BOS by itself
        self._settings = FinetuneSettings(
            steps=steps,
            batch_size=BATCH,
            weight_decay=0.0,
            adam_beta2=0.999,
            warmup_steps=0,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
        )

    def ours(self) -> Callable[[], tuple[list[float], list[float]]]:
        """A call that trains and returns losses and milliseconds a step."""
        self._network.load_state_dict(self._weights)
        model = from_network(self._network, self._tokenizer, "random", self_check=False)
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

    def trl(self) -> Callable[[], tuple[list[float], list[float]]]:
        """The same by SFTTrainer."""
        self._network.load_state_dict(self._weights)
        self._network.set_attn_implementation("sdpa")
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
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                max_length=None,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
            )
            trainer = trl.SFTTrainer(
                model=self._network,
                args=arguments,
                processing_class=self._tokenizer,
                callbacks=[Clock()],
                train_dataset=datasets.Dataset.from_list([{"text": text} for text in self._taken]),
            )
            trainer.remove_callback(transformers.PrinterCallback)

        def call() -> tuple[list[float], list[float]]:
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return losses, [1e3 * ms for ms in np.diff(clock)]

        return call


def _steps(name: str, size: dict[str, Any], texts: list[str], steps: int, rounds: int) -> list[Row]:
    case = _Case(size, texts, steps)
    makers = {"icl_ft_fast": case.ours, "TRL": case.trl}
    samples: dict[str, list[float]] = {variant: [] for variant in makers}
    for _ in range(rounds):
        losses: dict[str, list[float]] = {}
        for variant, make in makers.items():
            losses[variant], ms = make()()
            samples[variant] += ms
        _check(losses)
    tokens = BATCH * sum(case.lengths) / len(case.lengths)
    label = (
        f"{name}, {len(texts)} documents of {min(case.lengths)} to {max(case.lengths)} tokens, {BATCH} a step, "
        f"{torch.get_num_threads()} threads"
    )
    rows = []
    for variant, ms in samples.items():
        median, p20, p80 = np.percentile(ms, [50, 20, 80]).tolist()
        rows.append(Row("finetune", label, variant, median, p20, p80, tokens / median * 1e3, "tokens/s"))
    return rows


def _memory(name: str, size: dict[str, Any], texts: list[str], steps: int) -> list[Row]:
    case = _Case(size, texts, steps)
    rows, losses = [], {}
    label = f"memory: {name}, {BATCH} documents of {min(case.lengths)} to {max(case.lengths)} tokens a step"
    makers = {"icl_ft_fast": case.ours, "TRL": case.trl}
    for variant, make in makers.items():
        call, found = make(), []
        peak = peak_bytes(lambda call=call, found=found: found.append(call()))
        losses[variant], ms = found[0]
        rate = BATCH * sum(case.lengths) / len(case.lengths) / ms[-1] * 1e3
        rows.append(Row("finetune", label, variant, ms[-1], ms[-1], ms[-1], rate, "tokens/s", peak_bytes=peak))
        del call, found
        case._network.zero_grad(set_to_none=True)
    _check(losses)
    return rows


def _check(losses: dict[str, list[float]]) -> None:
    """Raise unless every variant has the same losses within 1e-4."""
    ours = losses["icl_ft_fast"]
    for variant, theirs in losses.items():
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        if not worst <= 1e-4:
            raise AssertionError(f"{variant}: losses differ by {worst:.1e}")
