"""Against TRL: the same loss curve, and adapters that either side trained."""

import copy
import itertools

import pytest

trl = pytest.importorskip("trl", reason="the extra trl is not installed")
import datasets
import peft

from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.finetuning.batches import order
from icl_ft_fast.finetuning.data import encode
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, RunOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its libraries' own
TEXTS = [f"the cat sat {'on that mat ' * (n % 4)}who knows {n}" for n in range(40)]
SEED = 3


def sft(network, tokenizer, texts, folder, **changes):
    """A trained SFTTrainer that takes texts as they come."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2)  # padding with EOS would leave EOS out of the loss
    peft_config = changes.pop("peft_config", None)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        weight_decay=0.0,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **changes,
    )
    rows = datasets.Dataset.from_list([{"text": text} for text in texts])
    trainer = trl.SFTTrainer(
        model=network, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_curve_is_trls(schedule, llama, plain_llama, tmp_path):
    settings = FinetuneSettings(
        steps=50 if schedule == "linear" else 10,
        batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.0,
        adam_beta2=0.999,
        warmup_steps=5,
        lr_scheduler_type=schedule,
    )
    ours = finetune(llama, TEXTS, settings, seed=SEED).losses
    taken = itertools.islice(order(encode(llama.tokenizer, TEXTS, 256), SEED), 8 * settings.steps)
    trainer = sft(
        copy.deepcopy(plain_llama),
        llama.tokenizer,
        [TEXTS[i] for i in taken],
        tmp_path,
        max_steps=settings.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=5,
        lr_scheduler_type=schedule,
    )
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == settings.steps
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.9 * ours[0]


def test_an_adapter_trained_by_trl_scores_here_as_in_peft(llama, llama_directory, plain_llama, plain, tmp_path):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = sft(
        copy.deepcopy(plain_llama),
        llama.tokenizer,
        TEXTS,
        tmp_path,
        max_steps=5,
        per_device_train_batch_size=8,
        peft_config=config,
    )
    trainer.save_model(str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain_llama), tmp_path / "adapter")
    requests = [([0, 5, 9], [14, 80]), ([0, 7], [33, 250, 1])]
    base = loglikelihood(llama, requests)
    for request, mine, before in zip(
        requests, loglikelihood(load(llama_directory, adapter=tmp_path / "adapter"), requests), base, strict=True
    ):
        assert mine.logp == pytest.approx(plain(theirs, *request)[0].sum().item(), abs=1e-4)
        assert abs(mine.logp - before.logp) > 1e-3


def test_ours_continues_in_trl(llama, plain_llama, tmp_path):
    """The checkpoint of a run here is what TRL goes on from."""
    finetune(
        llama, TEXTS, FinetuneSettings(steps=3, learning_rate=3e-3), options=RunOptions(output_dir=tmp_path / "ours")
    )
    settings = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer = sft(str(tmp_path / "ours"), llama.tokenizer, TEXTS[:8], tmp_path / "trl", **settings)
    continued = trainer.state.log_history[0]["loss"]
    once = finetune(
        from_network(load(tmp_path / "ours").network, llama.tokenizer, "ours"),
        TEXTS[:8],
        FinetuneSettings(steps=1, batch_size=8, learning_rate=1e-9),
    )
    assert once.losses[0] == pytest.approx(continued, rel=1e-4)
