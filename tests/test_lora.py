"""Adapters against peft itself: what is saved, loaded and merged, and what cannot be adapted."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from icl_ft_fast.cli import main
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.model import ModelError
from icl_ft_fast.finetuning import lora
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, LoraSettings, RunOptions
from icl_ft_fast.study.results import Setting, as_json
from icl_ft_fast.study.settings import StudySettings

peft = pytest.importorskip("peft", reason="the extra lora is not installed")

TEXTS = [f"the cat sat on mat {n} who knows why" for n in range(6)]
SETTINGS = FinetuneSettings(steps=5, batch_size=3, learning_rate=1e-2, warmup_steps=0, save_steps=5)
REQUESTS = [("the cat", " sat on mat 3"), ("who knows", " why"), ("42", " über")]
KINDS = {
    "plain": LoraSettings(r=4, target_modules=("q_proj", "v_proj")),
    "rslora": LoraSettings(r=4, lora_alpha=8, use_rslora=True),
    "dora": LoraSettings(r=4, use_dora=True),
    "default": LoraSettings(target_modules=None),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_scores_the_same_in_peft_and_here(kind, llama, llama_directory, plain_llama, plain, tmp_path):
    tuned = finetune(llama, TEXTS, replace(SETTINGS, lora=KINDS[kind]), options=RunOptions(output_dir=tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", KINDS[kind].r)
    assert (config["use_rslora"], config["use_dora"]) == (kind == "rslora", kind == "dora")
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain_llama), tmp_path)
    ours = loglikelihood(load(llama_directory, adapter=tmp_path), REQUESTS)
    before = loglikelihood(llama, REQUESTS)
    for request, mine, merged, base in zip(REQUESTS, ours, loglikelihood(tuned.model, REQUESTS), before, strict=True):
        context, continuation = (llama.tokenizer(text, add_special_tokens=False)["input_ids"] for text in request)
        logp, _ = plain(theirs, [0, *context], continuation)
        assert mine.logp == pytest.approx(logp.sum().item(), abs=1e-4)
        assert merged.logp == pytest.approx(logp.sum().item(), abs=1e-4)
        assert abs(mine.logp - base.logp) > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_gradients_are_pefts(llama, plain_llama, tmp_path, monkeypatch):
    """One step of plain descent on the adapters, against peft's network forwarded text by text in float64."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    inject = lora.inject

    def inject_and_nudge(network, *arguments):  # B is zero at first, and so would A's gradient be
        adapted = inject(network, *arguments)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * parameter.requires_grad
        return adapted

    monkeypatch.setattr(lora, "inject", inject_and_nudge)
    settings = replace(SETTINGS, steps=1, batch_size=6, learning_rate=1.0, clip_norm=1e9, lora=KINDS["rslora"])
    finetune(llama, TEXTS, settings, seed=3, options=RunOptions(output_dir=tmp_path))
    after = load_file(tmp_path / "adapter_model.safetensors")

    network = copy.deepcopy(plain_llama)
    theirs = inject_and_nudge(network, KINDS["rslora"], 3).double()
    ours = [vars(module).pop("forward") for module in theirs.modules() if "forward" in vars(module)]
    assert len(ours) == 2 * 7
    losses = []
    for text in TEXTS:
        ids = torch.tensor([[0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"], 1]])
        logits = theirs(ids[:, :-1], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    torch.cat(losses).mean().backward()
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == len(after) == 2 * 7 * 2
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 2e-5
        moved = parameter.detach() - after[name.replace(".default", "")]
        assert (moved - parameter.grad).abs().max() < 1e-5, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_step_multiplies_the_frozen_head_twice(llama):
    """Once for logits and once for their gradient, of which target_logprob_backward would make the logits anew."""
    products = {"target_logprob": 1, "target_logprob_sum": 2, "target_logprob_backward": 2}
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, arguments=(), kwargs=None):
            if func.namespace == "icl_ft_fast" and func._opname in products:
                called.append(func._opname)
            return func(*arguments, **kwargs or {})

    with Calls():
        finetune(llama, TEXTS, replace(SETTINGS, steps=3, save_steps=None, lora=KINDS["plain"]))
    assert sum(products[name] for name in called) == 3 * 2


def test_an_adapted_layer_of_bfloat16_is_pefts(llama):
    network = copy.deepcopy(llama.network).bfloat16()
    lora.inject(network, KINDS["plain"], 0)
    layer = network.model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x, weights = torch.randn(2, 5, layer.in_features).bfloat16().requires_grad_(), list(layer.lora_A.parameters())
    found = []
    for forward in (layer.forward, partial(type(layer).forward, layer)):
        out = forward(x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *weights, *layer.lora_B.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= 0.01 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_folder_of_an_adapter_is_a_model_and_one_trained_on_it_too(llama_directory, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.chdir(llama_directory.parent)  # a relative path must be found from elsewhere
    one = replace(SETTINGS, steps=1, learning_rate=1e-2, lora=LoraSettings(r=4))
    tuned = finetune(load(llama_directory.name), TEXTS, one, options=RunOptions(output_dir=first))
    monkeypatch.chdir(tmp_path)
    expected = loglikelihood(tuned.model, REQUESTS)
    for found in (load(first), load(llama_directory, adapter=first)):
        assert loglikelihood(found, REQUESTS) == expected
    again = finetune(load(first), TEXTS, one, options=RunOptions(output_dir=second))
    found = loglikelihood(load(second), REQUESTS)
    assert found == loglikelihood(again.model, REQUESTS)
    assert found != expected
    (tmp_path / "q.jsonl").write_text('{"id": "q", "prompt": "the cat", "choices": [" sat", " why"], "answer": 0}\n')
    for n, model in enumerate((["second"], [str(llama_directory), "--adapter", "first"], [str(llama_directory)])):
        assert main(["score", "--model", *model, "--questions", "q.jsonl", "--out", f"{n}.jsonl"]) == 0
    assert len({(tmp_path / f"{n}.jsonl").read_text() for n in range(3)}) == 3
    loaded = load(llama_directory, adapter=first)
    assert as_json(Setting(loaded, "task", StudySettings()), [])["model"].endswith("/first")
    described = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(first)}))
    with pytest.raises(ModelError, match=r"adapter_config.json: base_model_name_or_path: give the model, and"):
        load(second)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_only_the_adapters_are_trained_and_dropout_is_seeded(llama, tmp_path):
    settings = replace(SETTINGS, lora=LoraSettings(r=2, lora_dropout=0.5))
    torch.manual_seed(1)
    one = finetune(llama, TEXTS, settings, seed=1, options=RunOptions(output_dir=tmp_path))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert finetune(llama, TEXTS, settings, seed=1).losses == one.losses
    assert torch.equal(torch.random.get_rng_state(), state)
    assert finetune(llama, TEXTS, replace(settings, lora=LoraSettings(r=2)), seed=1).losses != one.losses
    embedding = llama.network.get_input_embeddings().weight
    assert torch.equal(one.model.network.get_input_embeddings().weight, embedding)
    assert not any("lora" in name for name, _ in one.model.network.named_parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_cannot_be_adapted(target, llama):
    with pytest.raises(FinetuneError, match="LoRA does not support the output head or the embeddings"):
        finetune(llama, TEXTS, replace(SETTINGS, lora=LoraSettings(target_modules=("q_proj", target))))
    with pytest.raises(FinetuneError, match=r"^target_modules: .*no_such"):
        finetune(llama, TEXTS, replace(SETTINGS, lora=LoraSettings(target_modules=("no_such",))))
    for wrong in ({"r": 0}, {"lora_dropout": 1.0}):
        with pytest.raises(FinetuneError, match=rf"^{next(iter(wrong))}: expected"):
            LoraSettings(**wrong)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_model_with_an_adapter_is_trained_further(llama, llama_directory, tmp_path):
    settings = replace(SETTINGS, lora=KINDS["plain"])
    finetune(llama, TEXTS, settings, options=RunOptions(output_dir=tmp_path / "lora"))
    model = load(llama_directory, adapter=tmp_path / "lora")
    tuned = finetune(model, TEXTS, replace(SETTINGS, save_steps=None))
    assert all(after < before for before, after in zip(tuned.losses[:2], tuned.losses[3:], strict=True))
    assert len(finetune(model, TEXTS, replace(settings, save_steps=None)).losses) == 5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads what transformers deprecates
def test_an_adapter_that_is_no_change_of_weights_is_refused_by_name(llama_directory, plain_llama, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(plain_llama), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PROMPT_TUNING puts tokens before the text, which no weights can do"):
        load(llama_directory, adapter=tmp_path)
