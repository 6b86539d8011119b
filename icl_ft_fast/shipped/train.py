"""Train the shipped model from scratch: `python -m icl_ft_fast.shipped.train --out DIR`.

Seeded and resumable: batch k depends on (seed, k) alone, and the latest checkpoint (weights, optimiser state, counts)
is replaced atomically, so the same command continues an interrupted run. CPU or GPU; under torchrun the processes share
the batches of each step.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.model import Rows
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.finetuning import distributed
from icl_ft_fast.runtime.durable import follow_umask, replacing
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.shipped import corpus
from icl_ft_fast.shipped.curriculum import CURRICULUM, Stage
from icl_ft_fast.shipped.lessons import DECISIVE, Segments
from icl_ft_fast.shipped.tokenizer import build_tokenizer
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.evaluate import select_documents
from icl_ft_fast.tasks.generated import GENERATORS

DEFAULT_TOKENS = CURRICULUM[-1].until
PEAK_LEARNING_RATE = 3e-3
SAVE_EVERY = 500
TASKS = ("simple-reversals", "simple-syllogisms", "semantic-structure", "process")
COUNTS = ("step", "batches", "tokens")  # of a run, in its checkpoint
PROGRESS_SEED = 1_000_003
LOOK_BACK = 6.0  # size of the first layer's initial biases: attention of about 0.9 on the intended token


def config(vocabulary: int) -> LlamaConfig:
    """4.2M parameters: 6 layers of width 256, 8 heads, a narrow MLP, tied embeddings, 4,096 positions.

    The rotary base is high for so narrow a head (32): only pairs that hardly turn within a context can match a name at
    any distance, and with the usual 10,000 those are 5 of 16 (LOG.md).
    """
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rope_theta=1e7,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
    )


@dataclass(frozen=True)
class LessonBatch:
    """Documents side by side, each a trunk and branches that see the trunk but not each other.

    Attributes:
        token: int64 [T]; depth, end: int32 [T], see model.Rows.
        target: int64 [T], the token that follows; weight: float32 [T], of its loss, 0 where none does.
    """

    token: torch.Tensor
    depth: torch.Tensor
    end: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def batch(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, number: int) -> LessonBatch:
    """As many documents as fit into the stage's rows; the first that does not loses what is behind them."""
    rng = random.Random(f"{seed}/{number}")
    token: list[int] = []
    depth: list[int] = []
    end: list[int] = []
    target: list[int] = []
    weight: list[float] = []

    def add(ids: list[int], weights: list[float], first: int, last: int) -> None:
        token.extend(ids)
        depth.extend(range(first, first + len(ids)))
        end.extend([last] * len(ids))
        target.extend([*ids[1:], 0])
        weight.extend([*weights[1:], 0.0])

    while len(token) < stage.rows:
        document = corpus.document(rng, stage.courses, stage.copying, stage.augmenting, stage.recalling)
        trunk, *branches = _encoded(tokenizer, *document)
        add(*trunk, 0, len(token) + sum(len(ids) for ids, _ in (trunk, *branches)))
        for ids, weights in branches:
            add(ids, weights, len(trunk[0]), len(token) + len(ids))
    rows = slice(stage.rows)
    return LessonBatch(
        torch.tensor(token[rows]),
        torch.tensor(depth[rows], dtype=torch.int32),
        torch.tensor(end[rows], dtype=torch.int32).clamp(max=stage.rows),
        torch.tensor(target[rows]),
        torch.tensor(weight[rows]),
    )


def _encoded(
    tokenizer: PreTrainedTokenizerFast, trunk: Segments, branches: list[Segments]
) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and loss weights of the trunk, which begins with BOS, and of each branch."""
    for number, segments in enumerate((trunk, *branches)):
        text = "".join(text for text, _ in segments)
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=number == 0)
        ends = list(itertools.accumulate(len(text) for text, _ in segments))
        weights = [segments[bisect.bisect_left(ends, end)][1] for _, end in encoded.offsets]  # BOS: (0, 0)
        yield encoded.ids, weights


def accuracies(folder: Path) -> dict[str, float]:
    """In-context accuracy of the model in `folder` on each split of each small task, of a seed reserved for this."""
    model = load(folder, self_check=False)
    found: dict[str, float] = {}
    for name in TASKS:
        preset = GENERATORS[name].presets["small"]
        task = GENERATORS[name].make(PROGRESS_SEED, **preset.arguments)
        documents = select_documents(task.documents, PROGRESS_SEED, per_topic=preset.study.get("icl_per_topic"))
        given = evaluate.accuracies(evaluate.answers(model, task.questions, context=icl_context(documents)))
        found |= {f"{name} {split}": round(accuracy.correct / accuracy.total, 3) for split, accuracy in given.items()}
    return found


class TrainingRun:
    """Network, optimisers and step of one training run, saved to and restored from one safetensors file.

    Muon updates the matrices (it reached the reversal circuit in about half of AdamW's tokens, LOG.md), AdamW the
    embedding and the norms; both follow the same learning rate.
    """

    def __init__(self, network: LlamaForCausalLM) -> None:
        self.network = network
        self.step = self.batches = self.tokens = 0
        matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
        rest = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def save(self, path: Path) -> None:
        """Replace the checkpoint atomically."""
        tensors = {f"network.{name}": p.detach() for name, p in self.network.named_parameters()}
        for o, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{o}.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        metadata = {name: str(getattr(self, name)) for name in COUNTS}
        with replacing(path) as partial:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=metadata)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        with safe_open(path, "pt") as file:
            for name in COUNTS:
                setattr(self, name, int(file.metadata()[name]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        self.network.load_state_dict(weights, strict=False)  # the tied head is stored once
        for o, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{o}."):
                    _, _, i, key = name.split(".")
                    states.setdefault(int(i), {})[key] = tensor
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate(done: float, step: int) -> float:
    """Linear warm-up over 60 steps, constant, and over the last three tenths linear down to a twentieth."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 60, 0.05 + 0.95 * (1 - done) / 0.3)


def build_network(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Initial weights: transformers' own, but blocks start as the identity and the first layer looks back.

    Head h of the first layer starts by attending to the token h + 1 places before: its query bias is a constant and its
    key bias the same one rotated by that many positions, where rotary embeddings make the two agree most. Retrieval
    from a context is built on such heads, and by themselves they take long to appear (LOG.md).
    """
    torch.manual_seed(seed)
    network = LlamaForCausalLM(config(vocabulary))
    for layer in network.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    attention, heads = network.model.layers[0].self_attn, network.config.num_attention_heads
    cos, sin = network.model.rotary_emb(torch.zeros(1), torch.arange(1, heads + 1)[None])
    half = attention.head_dim // 2
    with torch.no_grad():
        attention.q_proj.bias.view(heads, 2, half)[:, 0] = LOOK_BACK
        attention.k_proj.bias.view(heads, 2, half)[:, 0] = LOOK_BACK * cos[0, :, :half]
        attention.k_proj.bias.view(heads, 2, half)[:, 1] = LOOK_BACK * sin[0, :, :half]
        attention.q_proj.weight.mul_(0.25)
        attention.k_proj.weight.mul_(0.25)
    return network


def train(out: Path, tokens: int, seed: int, device: str) -> None:
    """Run (or continue) the recipe; leaves config, bfloat16 weights, tokenizer and metrics.jsonl in `out`.

    Each process forwards its part of a step's batches; all hold the same weights, the first writes.
    """
    rank, processes = distributed.place()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"
    tokenizer = build_tokenizer()
    network = build_network(len(tokenizer), seed).to(device)
    from_network(network, tokenizer, "shipped", self_check=False)  # from here on its attention is the trie's
    run = TrainingRun(network)
    if checkpoint.exists():
        run.restore(checkpoint)
    compiled = torch.compile(network, dynamic=False)
    right, decisive = torch.zeros((), dtype=torch.int64, device=device), 0  # predictions since the last save
    with Activity("training", total=tokens, unit="token", initial=run.tokens, shown=rank == 0) as bar:
        while run.tokens < tokens:
            stage = next(stage for stage in CURRICULUM if run.tokens * CURRICULUM[-1].until < stage.until * tokens)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(run.tokens / tokens, run.step)
            for number in range(run.batches + rank, run.batches + stage.batches, processes):
                given = batch(tokenizer, stage, seed, number)
                token, depth, end, target, weight = (t.to(device) for t in vars(given).values())
                rows = Rows(token, depth, torch.arange(len(token), dtype=torch.int32, device=device), end, depth)
                with torch.autocast(device, torch.bfloat16):
                    output = compiled(token[None], position_ids=depth[None].long(), use_cache=False, icl_rows=rows)
                logits = output.logits[0].float()
                loss = (F.cross_entropy(logits, target, reduction="none") @ weight) / given.weight.sum()
                (loss / stage.batches).backward()
                right += ((logits.argmax(-1) == target) & (weight == DECISIVE)).sum()  # read at the next save
                decisive += int((given.weight == DECISIVE).sum())
            _sum_gradients(network)
            torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.step += 1
            run.batches += stage.batches
            run.tokens += stage.batches * stage.rows
            bar.update(stage.batches * stage.rows)
            if run.step % SAVE_EVERY == 0 or run.tokens >= tokens:
                correct, asked = distributed.totals([right.item(), decisive], right.device)
                if rank == 0:
                    run.network.save_pretrained(out / "progress")
                    tokenizer.save_pretrained(out / "progress")
                    row = {
                        "step": run.step,
                        "tokens": run.tokens,
                        "loss": loss.item(),
                        "decisive": correct / max(1, asked),
                    }
                    bar.note(loss=f"{row['loss']:.3f}", decisive=f"{row['decisive']:.2f}")
                    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, "accuracy": accuracies(out / "progress")}) + "\n")
                    run.save(checkpoint)
                right.zero_()
                decisive = 0
    if rank == 0:
        run.network.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        follow_umask(out / "model.safetensors")


def _sum_gradients(network: LlamaForCausalLM) -> None:
    """Every process gets the sum of all processes' gradients; one that had no batch adds zeros."""
    if distributed.place()[1] > 1:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        torch.distributed.all_reduce(flat)
        parts = flat.split([parameter.numel() for parameter in network.parameters()])
        for parameter, part in zip(network.parameters(), parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_ft_fast.shipped.train",
        description="Train the shipped model from scratch. Run again with the same --out to continue.",
        epilog="example: python -m icl_ft_fast.shipped.train --out out/shipped",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, metrics and the finished model")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="tokens to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="initial weights and text (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    if distributed.device() != "cpu":
        torch.cuda.set_device(distributed.device())  # each process of torchrun has a GPU of its own
    with distributed.joined():
        train(arguments.out, arguments.tokens, arguments.seed, arguments.device)


if __name__ == "__main__":
    main()
