"""A run's files: what TRL's users find, exact resumption, and what is left after every way of dying."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, TrainerState

from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.finetuning import checkpoint as checkpoint_module
from icl_ft_fast.finetuning import run as finetune_run
from icl_ft_fast.finetuning.checkpoint import RunFolder
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.run import InterruptedRunError, finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, LoraSettings, RunOptions
from icl_ft_fast.runtime import durable
from icl_ft_fast.study.results import unmeasured

TEXTS = [f"the cat sat on mat {n} who knows why" for n in range(6)]
HELD = ["the mat sat on that cat", "who knows 42"]
SETTINGS = FinetuneSettings(
    steps=6,
    batch_size=2,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    save_steps=2,
    eval_steps=3,
    logging_steps=2,
    gradient_accumulation_steps=2,
)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    """Everything below a folder but the clock, and the checksums, which differ as it does."""
    read = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS"):
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in content.splitlines()]
        elif path.name == "progress.json":
            content = unmeasured(json.loads(content))
        elif path.suffix == ".json":
            content = content.replace(str(folder).encode(), b"")
        read[str(path.relative_to(folder))] = content
    return read


def stop_after(monkeypatch, step, do):
    """Call do() in the middle of a step."""
    real, steps = finetune_run.train_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == step:
            do()
        return real(*arguments)

    monkeypatch.setattr(finetune_run, "train_step", interrupted)


def test_the_files_of_a_run(llama, tmp_path):
    tuned = finetune(llama, TEXTS, SETTINGS, validation=HELD, options=RunOptions(output_dir=tmp_path / "run"))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert tuple(line["loss"] for line in lines) == tuned.losses
    assert [line["learning_rate"] for line in lines] == [SETTINGS.rate(step) for step in range(6)]
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [f"checkpoint-{n}" for n in (2, 3, 4, 6)]
    state = TrainerState.load_from_json(str(run / "checkpoint-6" / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.epoch) == (6, 6, 4.0)
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert [entry["step"] for entry in state.log_history if "loss" in entry] == [2, 4, 6]
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert state.best_model_checkpoint == str(run / f"checkpoint-{best['step']}")
    for folder, expected in ((run, tuned.model), (run / f"checkpoint-{best['step']}", tuned.model)):
        assert equal(weights(load(folder)), weights(expected))
    assert not list(run.rglob(".*"))
    assert len({p.stat().st_mode for p in run.rglob("*") if p.is_file()}) == 1  # that of the umask
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_best_checkpoint_is_what_is_returned_and_kept(llama, tmp_path):
    settings = replace(SETTINGS, steps=40, learning_rate=3e-2, eval_steps=2, save_total_limit=1, save_steps=None)
    settings = replace(settings, early_stopping_patience=3, lr_scheduler_type="constant")
    tuned = finetune(llama, TEXTS[:2], settings, validation=HELD, options=RunOptions(output_dir=tmp_path))
    state = json.loads(max(tmp_path.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime).read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert 1 < len(tuned.losses) < 40
    assert len(tuned.losses) == best + 2 * 3  # three evaluations without a better one
    kept = {f"checkpoint-{best}", f"checkpoint-{len(tuned.losses)}"}
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == kept
    requests = [(tokens.ids[:1], tokens.ids[1:]) for tokens in encode(tuned.model.tokenizer, HELD, 256)]
    logp = sum(result.logp for result in loglikelihood(tuned.model, requests))
    assert -logp / sum(len(ids) for _, ids in requests) == pytest.approx(losses[best], abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16"])
def test_resumed_is_uninterrupted_to_the_bit(kind, llama, llama_directory, tmp_path, monkeypatch):
    settings, model = SETTINGS, llama
    if kind == "lora":
        settings = replace(settings, lora=LoraSettings(r=4, lora_dropout=0.5))
    elif kind == "bfloat16":
        model = load(llama_directory, dtype="bfloat16")
    whole = finetune(model, TEXTS, settings, validation=HELD, seed=5, options=RunOptions(output_dir=tmp_path / "whole"))
    for step in (3, 5):  # in the middle of step 3, then in the middle of step 5 (steps 3 and 4 are done again)
        with monkeypatch.context() as patch:
            stop_after(patch, step - (step > 3) * 2, lambda: (_ for _ in ()).throw(KeyError("dies")))
            with pytest.raises(KeyError, match="dies"):
                finetune(
                    model,
                    TEXTS,
                    settings,
                    validation=HELD,
                    seed=5,
                    options=RunOptions(output_dir=tmp_path / "cut", resume=step > 3),
                )
    again = finetune(
        model, TEXTS, settings, validation=HELD, seed=5, options=RunOptions(output_dir=tmp_path / "cut", resume=True)
    )
    assert again.losses == whole.losses
    assert equal(weights(again.model), weights(whole.model))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_only_the_same_run_is_resumed(llama, llama_directory, tmp_path):
    finetune(llama, TEXTS, replace(SETTINGS, steps=2), options=RunOptions(output_dir=tmp_path))
    before = files(tmp_path)
    with pytest.raises(FinetuneError, match="holds a run already; resume it or choose another folder"):
        finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path))
    with pytest.raises(FinetuneError, match=r"checkpoint-2: cannot be resumed: steps was 2, now 6"):
        finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path, resume=True))
    with pytest.raises(FinetuneError, match=r"cannot be resumed: examples was"):
        finetune(llama, TEXTS[:5], replace(SETTINGS, steps=2), options=RunOptions(output_dir=tmp_path, resume=True))
    another = load(llama_directory, dtype="bfloat16")
    with pytest.raises(FinetuneError, match=r"cannot be resumed: model was"):
        finetune(another, TEXTS, replace(SETTINGS, steps=2), options=RunOptions(output_dir=tmp_path, resume=True))
    assert files(tmp_path) == before
    for arguments in ({"validation": HELD}, {"options": RunOptions(resume=True)}):
        with pytest.raises(FinetuneError, match=r"^output_dir: required for"):
            finetune(llama, TEXTS, SETTINGS, **arguments)


def test_a_checkpoint_that_was_changed_is_not_resumed(llama, tmp_path):
    finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path))
    last = tmp_path / "checkpoint-6"
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for damage in (whole[:-3], whole[:9] + bytes([whole[9] ^ 4]) + whole[10:], b"something else", None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(FinetuneError, match=r"damaged, lost, or not of this checkpoint; remove .*-6 to resume"):
                RunFolder(tmp_path, {}, resume=True, is_writer=True).restore()
        path.write_bytes(whole)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=last, check=True)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text()
    for damage in (lines[: len(lines) // 2], "x" + lines, '{"epoch": 1}\n'):
        metrics.write_text(damage)
        with pytest.raises(
            FinetuneError, match=r"metrics\.jsonl: damaged, or of another run: expected a line for each"
        ):
            finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path, resume=True))
        assert metrics.read_text() == damage
    metrics.write_text(lines)
    shutil.rmtree(last)
    finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path, resume=True))
    assert last.exists()


def test_checkpoints_by_time_count_what_a_run_without_them_counts(llama, tmp_path, monkeypatch):
    def count(**where):
        ledger, options = Ledger(), RunOptions(**where)
        tuned = finetune(llama, TEXTS, SETTINGS, teacher_context="the cat", ledger=ledger, options=options)
        return tuned.losses, unmeasured(ledger.as_dict())

    with monkeypatch.context() as patch:
        stop_after(patch, 4, lambda: (_ for _ in ()).throw(KeyError("dies")))
        with pytest.raises(KeyError, match="dies"):
            count(output_dir=tmp_path, resume=True, checkpoint_s=0.0)
    assert count(output_dir=tmp_path, resume=True, checkpoint_s=1e9) == count()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoint-3"}
    with pytest.raises(FinetuneError, match=r"^checkpoint_s: needs output_dir"):
        finetune(llama, TEXTS, SETTINGS, options=RunOptions(checkpoint_s=1.0))


@pytest.mark.parametrize("step", [3, SETTINGS.steps])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_at_a_checkpoint(number, step, llama, tmp_path, monkeypatch):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), number))
        message = f"interrupted after step {step}; checkpoint-{step} is complete and can be resumed"
        with pytest.raises(InterruptedRunError, match=f"^{message}$"):
            finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path / "cut"))
    assert signal.getsignal(number) == before
    whole = finetune(llama, TEXTS, SETTINGS)
    assert (
        finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path / "cut", resume=True)).losses
        == whole.losses
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory; lower batch_size, or set gradient_checkpointing",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_out_of_memory(error, message, llama, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4, lambda: (_ for _ in ()).throw(error))
    with pytest.raises(FinetuneError, match=f"^step 3: {message}.*; checkpoint-2 is complete and can be resumed$"):
        finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path))


def test_a_loss_or_gradient_that_is_not_finite(llama, tmp_path, monkeypatch):
    real = finetune_run.train_step
    for place, what in ((0, "the loss is nan"), (1, "the gradient's norm is nan")):
        steps = []

        def broken(*arguments, steps=steps, place=place):
            result = list(real(*arguments))
            steps.append(1)
            if len(steps) == 4:
                result[place] = math.nan
            return tuple(result)

        monkeypatch.setattr(finetune_run, "train_step", broken)
        with pytest.raises(FinetuneError, match=f"^step 3: {what}; lower the learning rate; checkpoint-2 is complete"):
            finetune(llama, TEXTS, SETTINGS, options=RunOptions(output_dir=tmp_path / str(place)))
        load(tmp_path / str(place) / "checkpoint-2")


@pytest.mark.parametrize("failing", range(0, 14, 2))
def test_a_full_disk(failing, llama, tmp_path, monkeypatch):
    """The failing-th sync of a file finds no space: whole checkpoints stay, nothing half-written remains."""
    real, calls = durable.sync, []

    def sync(path):
        calls.append(path)
        if len(calls) > failing + 8:
            raise OSError(28, "No space left on device", str(path))
        real(path)

    with monkeypatch.context() as patch:
        for module in (durable, checkpoint_module):
            patch.setattr(module, "sync", sync)
        with pytest.raises(FinetuneError, match=r"cannot be written: No space left on device"):
            finetune(llama, TEXTS, replace(SETTINGS, steps=4), options=RunOptions(output_dir=tmp_path))
    assert not list(tmp_path.glob(".*"))
    for folder in tmp_path.glob("checkpoint-*"):
        load(folder)
    again = finetune(llama, TEXTS, replace(SETTINGS, steps=4), options=RunOptions(output_dir=tmp_path, resume=True))
    assert again.losses == finetune(llama, TEXTS, replace(SETTINGS, steps=4)).losses


def test_bfloat16_weights_are_rounded_from_float32_copies(llama_directory, monkeypatch):
    """A rate too low for bfloat16 to move still adds up."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    model = load(llama_directory, dtype="bfloat16")
    settings = FinetuneSettings(steps=1, batch_size=6, learning_rate=1e-4, warmup_steps=0, clip_norm=1e-2)
    once = weights(finetune(model, TEXTS, settings).model)
    often = weights(finetune(model, TEXTS, replace(settings, steps=60)).model)
    name = "model.layers.0.mlp.down_proj.weight"
    assert all(tensor.dtype == torch.bfloat16 for tensor in often.values())
    moved = [(x[name].float() - weights(model)[name].float()).norm().item() for x in (once, often)]
    assert moved[1] > 20 * moved[0]


def test_schedules():
    """transformers' own, at every step; "constant" warms up from its first step on."""
    from transformers import get_scheduler

    for name in ("constant_with_warmup", "linear", "cosine"):
        settings = FinetuneSettings(steps=20, warmup_steps=5, learning_rate=0.5, lr_scheduler_type=name)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20)
        for step in range(20):
            assert settings.rate(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), (name, step)
            optimizer.step()
            scheduler.step()
    settings = FinetuneSettings(warmup_steps=4, learning_rate=0.4)
    assert [settings.rate(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_trackers_only_when_installed(llama, tmp_path, monkeypatch):
    with pytest.raises(FinetuneError, match=r"^report_to: expected some of tensorboard, wandb, trackio, got 'mlflow'$"):
        finetune(llama, TEXTS, replace(SETTINGS, report_to=("mlflow",)), options=RunOptions(output_dir=tmp_path / "a"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FinetuneError, match=r"^report_to: wandb is not installed: pip install wandb$"):
        finetune(llama, TEXTS, replace(SETTINGS, report_to=("wandb",)), options=RunOptions(output_dir=tmp_path / "b"))
    logged = []

    class Tracker:
        @staticmethod
        def init(project, name, config):
            assert (project, name, config["steps"]) == ("icl_ft_fast", "c", 6)
            return Tracker

        @staticmethod
        def log(entry, step):
            logged.append((step, *entry))

        @staticmethod
        def finish():
            logged.append("closed")

    monkeypatch.setitem(sys.modules, "trackio", Tracker)
    finetune(llama, TEXTS, replace(SETTINGS, report_to=("trackio",)), options=RunOptions(output_dir=tmp_path / "c"))
    assert [step for step, *_ in logged[:-1]] == [2, 4, 6]
    assert "loss" in logged[0]
    assert logged[-1] == "closed"


def test_a_tokenizer_with_several_chat_templates_keeps_them_all(llama, tmp_path):
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = {
        "default": "{{ messages }}",
        "tool_use": "{{ tools }}",
    }  # written to a folder of their own
    model = from_network(llama.network, tokenizer, "llama", self_check=False)
    finetune(model, TEXTS, replace(SETTINGS, steps=2, save_steps=1), options=RunOptions(output_dir=tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert (tmp_path / "checkpoint-1" / "additional_chat_templates" / "tool_use.jinja").exists()
    (tmp_path / "checkpoint-2" / "additional_chat_templates" / "tool_use.jinja").write_text("", encoding="utf-8")
    with pytest.raises(FinetuneError, match=r"tool_use\.jinja: damaged, lost"):
        finetune(
            model, TEXTS, replace(SETTINGS, steps=3, save_steps=1), options=RunOptions(output_dir=tmp_path, resume=True)
        )


def test_a_run_killed_before_it_removed_old_checkpoints_removes_them_at_its_next_start(llama, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=4, save_steps=1, save_total_limit=2)
    monkeypatch.setattr(RunFolder, "prune", lambda *_: None)
    finetune(llama, TEXTS, settings, options=RunOptions(output_dir=tmp_path, resume=True))
    monkeypatch.undo()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    finetune(llama, TEXTS, settings, options=RunOptions(output_dir=tmp_path, resume=True))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
