"""Two processes against one: DDP and FSDP2 as under torchrun, gloo on the CPU."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked import forked
from safetensors.torch import load_file

from icl_ft_fast.engine.loading import load
from icl_ft_fast.finetuning import distributed
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, LoraSettings, RunOptions

TEXTS = [f"the cat sat on mat {n} who knows why" for n in range(6)]
SETTINGS = FinetuneSettings(steps=4, batch_size=2, learning_rate=1e-2, save_steps=2, gradient_accumulation_steps=2)
ONE = replace(SETTINGS, batch_size=4)  # two processes take two examples each
RUNS = {"ddp": {}, "fsdp": {"fsdp": True}, "lora": {"lora": LoraSettings(r=4, use_dora=True)}}
RUNS |= {"lora-fsdp": {"lora": LoraSettings(r=3), "fsdp": True}}


def work(folder, model_directory):
    """What each of the two processes does: every run, then the sharded ones cut after step 3 and resumed."""
    with distributed.joined():
        model = load(model_directory)
        for name, changes in RUNS.items():
            settings, options = replace(SETTINGS, **changes), RunOptions(output_dir=folder / name)
            tuned = finetune(model, TEXTS, settings, validation=TEXTS[:1], seed=7, options=options)
            if distributed.place()[0] == 0:
                tuned.model.network.save_pretrained(folder / name / "returned")
        for name, step in itertools.product(("fsdp", "lora-fsdp"), (3, 4)):
            cut(model, name, step, folder / f"cut-{name}")


def cut(model, name, step, folder):
    """Run to a step; that a process was asked to stop is said to all among their sums."""
    real, calls = distributed.totals, []

    def totals(values, device):
        calls.append(1)
        return real([values[0], len(calls) == 3 and step == 3], device)

    stops = pytest.raises(ValueError, match="interrupted after step 3") if step == 3 else nullcontext()
    with stops, pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "totals", totals)
        options = RunOptions(output_dir=folder, resume=step > 3)
        finetune(model, TEXTS, replace(SETTINGS, **RUNS[name]), validation=TEXTS[:1], seed=7, options=options)


@pytest.fixture(scope="module")
def two(llama_directory, tmp_path_factory):
    """Folders of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    codes, told = forked(*[partial(work, folder, llama_directory)] * 2, as_ranks=True)
    assert codes == [0, 0], told
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, two, llama, tmp_path):
    one = finetune(
        llama,
        TEXTS,
        replace(ONE, **RUNS[name] | {"fsdp": False}),
        validation=TEXTS[:1],
        seed=7,
        options=RunOptions(output_dir=tmp_path),
    )
    lines = [json.loads(line) for line in (two / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(one.losses, abs=1e-5)
    weights = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    one.model.network.save_pretrained(tmp_path / "returned")
    for file in (weights, "returned/model.safetensors"):
        mine, theirs = load_file(tmp_path / file), load_file(two / name / file)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert (tensor - theirs[key]).abs().max() < 1e-5, key


def test_a_checkpoint_of_two_processes_loads_in_one(two, llama_directory):
    tuned = load(two / "fsdp" / "checkpoint-2")  # proves itself on a small trie
    assert tuned.num_parameters == load(llama_directory).num_parameters
    for run in ("ddp", "fsdp"):
        state = load_file(two / run / "checkpoint-2" / "optimizer.safetensors")
        moments = {key.partition("/")[2]: value for key, value in state.items() if key.startswith("exp_avg/")}
        for name, parameter in tuned.network.named_parameters():
            assert moments[name].shape == parameter.shape


@pytest.mark.parametrize(("name", "weights"), [("fsdp", "model"), ("lora-fsdp", "adapter_model")])
def test_a_sharded_run_is_resumed_to_the_bit(name, weights, two):
    mine, theirs = (load_file(two / run / f"{weights}.safetensors") for run in (f"cut-{name}", name))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert (two / f"cut-{name}" / "checkpoint-3").is_dir()


def test_one_process_cannot_shard(llama, tmp_path):
    with pytest.raises(FinetuneError, match=r"^fsdp: requires several processes: start the command with torchrun$"):
        finetune(llama, TEXTS, replace(SETTINGS, fsdp=True), options=RunOptions(output_dir=tmp_path))
