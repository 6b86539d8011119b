"""Fine-tuning against plain transformers: losses and gradients of packed documents, seeds, and what is refused."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings
from icl_ft_fast.tasks.sentences import split_sentences

# Prefixes shared by all, by two, by none; a text that is another's beginning; the same text twice; one without words.
TEXTS = (
    "Note: femp are more common than glon.",
    "Note: femp are more common than zota.",
    "Note: femp are more",
    "glon are wider than femp.",
    "glon are wider than femp.",
    "",
)


@pytest.fixture(scope="module")
def exact_llama(plain_llama):
    """The same weights as `llama` in float64, under transformers' own attention."""
    return copy.deepcopy(plain_llama).double()


def token_ids(llama, text):
    """BOS or what stands for it, the text, EOS."""
    tokenizer = llama.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return torch.tensor([[first, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])


def plain_loss(llama, exact_llama, texts):
    """Mean cross-entropy over the tokens of all texts, each text forwarded alone."""
    losses = []
    for text in texts:
        ids = token_ids(llama, text)
        logits = exact_llama(ids[:, :-1], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


def use_plain_descent(monkeypatch):
    """Replace AdamW by gradient descent, so that a step of learning rate 1 leaves the gradient in the weights."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))


def settings_of_one_step(**changes):
    arguments = {"steps": 1, "batch_size": len(TEXTS), "learning_rate": 1.0, "warmup_steps": 0, "clip_norm": math.inf}
    return FinetuneSettings(**(arguments | changes))


def descent(before, after):
    """What one step of gradient descent at learning rate 1 subtracted, by name."""
    after = dict(after.network.named_parameters())
    return {name: (parameter - after[name]).detach() for name, parameter in before.network.named_parameters()}


def test_loss_and_gradients_are_those_of_separate_documents(llama, exact_llama, monkeypatch):
    use_plain_descent(monkeypatch)
    tuned = finetune(llama, TEXTS, settings_of_one_step())
    loss = plain_loss(llama, exact_llama, TEXTS)
    assert len(tuned.losses) == 1
    assert abs(tuned.losses[0] - loss.item()) < 1e-5
    exact_llama.zero_grad()
    loss.backward()
    exact = dict(exact_llama.named_parameters())
    gradients = descent(llama, tuned.model)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert exact[name].grad.abs().max() > 1e-4, name
        assert (gradient - exact[name].grad).abs().max() < 1e-5, name


def test_a_batch_of_one_text_is_that_text(llama, exact_llama, monkeypatch):
    use_plain_descent(monkeypatch)
    tuned = finetune(llama, TEXTS[:1], settings_of_one_step(batch_size=1))
    assert abs(tuned.losses[0] - plain_loss(llama, exact_llama, TEXTS[:1]).item()) < 1e-5
    again = finetune(llama, TEXTS[:1], settings_of_one_step(batch_size=3))  # the same text three times over
    assert again.losses[0] == pytest.approx(tuned.losses[0], abs=1e-5)


def test_an_epoch_takes_every_text_once(llama, exact_llama):
    texts = [TEXTS[0], TEXTS[3], "femp", "zota are less common than glon."]
    alone = {text: plain_loss(llama, exact_llama, [text]).item() for text in texts}
    # so slow that every loss is that of the first weights
    tuned = finetune(llama, texts, FinetuneSettings(steps=12, batch_size=1, learning_rate=1e-12), seed=5)
    order = [min(texts, key=lambda text: abs(alone[text] - loss)) for loss in tuned.losses]
    assert max(abs(alone[text] - loss) for text, loss in zip(order, tuned.losses, strict=True)) < 1e-5
    epochs = [order[start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_steps_follow_from_one_another(llama, monkeypatch):
    use_plain_descent(monkeypatch)
    settings = settings_of_one_step(learning_rate=0.1)
    first = finetune(llama, TEXTS, settings)
    second = finetune(first.model, TEXTS, settings)
    both = finetune(llama, TEXTS, replace(settings, steps=2))
    assert both.losses == first.losses + second.losses
    for name, gradient in descent(second.model, both.model).items():
        assert gradient.abs().max() < 1e-6, name


def test_learning_rate_warms_up(llama, monkeypatch):
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self):
            rates.extend(group["lr"] for group in self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: Recorder(parameters, lr=lr))
    finetune(llama, TEXTS, FinetuneSettings(steps=6, batch_size=1, learning_rate=0.4, warmup_steps=4))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_gradients_are_clipped_to_a_norm(llama, monkeypatch):
    use_plain_descent(monkeypatch)
    whole, clipped = (
        descent(llama, finetune(llama, TEXTS, settings_of_one_step(clip_norm=clip_norm)).model)
        for clip_norm in (math.inf, 0.5)
    )
    norm = torch.stack([gradient.norm() for gradient in whole.values()]).norm().item()
    assert norm > 0.5
    for name, gradient in whole.items():
        assert torch.allclose(clipped[name], gradient * 0.5 / norm, atol=1e-6), name


def test_a_seed_fixes_the_result_to_the_bit(llama):
    settings = FinetuneSettings(steps=4, batch_size=2, learning_rate=1e-3)
    torch.manual_seed(1)
    one = finetune(llama, TEXTS, settings, seed=3)
    torch.manual_seed(2)
    same = finetune(llama, TEXTS, settings, seed=3)
    assert one.losses == same.losses
    for (name, mine), theirs in zip(one.model.network.named_parameters(), same.model.network.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert finetune(llama, TEXTS, settings, seed=4).losses != one.losses


def test_dropout_of_the_config_draws_nothing(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    gpt2 = from_network(GPT2LMHeadModel(config), tokenizer, "gpt2")
    settings = FinetuneSettings(steps=2, batch_size=2)
    torch.manual_seed(1)
    one = finetune(gpt2, TEXTS, settings)
    torch.manual_seed(2)
    assert finetune(gpt2, TEXTS, settings).losses == one.losses


def test_the_original_is_left_as_it_is(llama):
    before = {name: parameter.clone() for name, parameter in llama.network.named_parameters()}
    tuned = finetune(llama, TEXTS, FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2))
    assert not llama.network.training
    assert not tuned.model.network.training
    for name, parameter in llama.network.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    changed = dict(tuned.model.network.named_parameters())
    assert all(not torch.equal(changed[name], parameter) for name, parameter in before.items())


def test_what_was_trained_on_becomes_likely(llama):
    ledger = Ledger()
    settings = FinetuneSettings(steps=40, batch_size=2, learning_rate=1e-2)
    tuned = finetune(llama, TEXTS[2:4], settings, ledger=ledger)
    assert len(tuned.losses) == 40
    assert tuned.losses[-1] < tuned.losses[0] / 4
    requests = [("glon are", " wider than femp.")]
    before, after = (loglikelihood(m, requests)[0] for m in (llama, tuned.model))
    assert after.logp > before.logp / 4
    assert after.is_greedy
    assert not before.is_greedy
    rows = {
        tuple(ids[:n]) for text in TEXTS[2:4] for ids in token_ids(llama, text).tolist() for n in range(1, len(ids))
    }
    assert ledger.trained_tokens == 40 * len(rows)


def text_of(llama, num_tokens):
    """A text of that many tokens beside BOS and EOS."""
    for count in range(num_tokens + 1):
        text = " ".join(["femp"] * count)
        while token_ids(llama, text).shape[1] - 2 < num_tokens:
            text += "."
        if token_ids(llama, text).shape[1] - 2 == num_tokens:
            return text
    raise AssertionError


def test_the_longest_text_and_one_token_more(llama):
    longest = llama.max_positions - 1  # BOS takes a position, EOS is predicted only
    finetune(llama, [text_of(llama, longest)], FinetuneSettings(steps=1, batch_size=1))
    message = rf"^texts\[1\]: 3 tokens over the model's {llama.max_positions} positions$"
    with pytest.raises(FinetuneError, match=message):
        finetune(llama, ["femp", text_of(llama, longest + 3)])


def test_no_texts(llama):
    with pytest.raises(FinetuneError, match=r"^texts: nothing to train on$"):
        finetune(llama, [])


def test_a_text_without_any_target(llama):
    tokenizer = copy.deepcopy(llama.tokenizer)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    tokenizer.eos_token = None
    with pytest.raises(FinetuneError, match=r"^texts\[1\]: no tokens$"):
        finetune(replace(llama, tokenizer=tokenizer), ["femp", ""])


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", -1e-3)]
    + [("learning_rate", math.nan), ("learning_rate", math.inf)],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(FinetuneError, match=rf"^{field}: expected .* got {value}$"):
        FinetuneSettings(**{field: value})


def test_a_loss_that_blows_up(llama):
    with pytest.raises(FinetuneError, match=r"^step \d+: the loss is (nan|inf); lower the learning rate$"):
        finetune(llama, TEXTS, FinetuneSettings(steps=30, learning_rate=1e12, warmup_steps=0))


def test_defaults_are_the_papers():
    assert FinetuneSettings() == FinetuneSettings(steps=500, batch_size=8, learning_rate=3e-4)


@pytest.mark.parametrize(
    ("text", "independent", "cumulative"),
    [
        ("a ab. ac? ad!", ["a ab.", "ac?", "ad!"], ["a ab.", "a ab. ac?", "a ab. ac? ad!"]),
        ("title\n\n* a.b\n* c", ["title", "* a.b", "* c"], ["title", "title\n\n* a.b", "title\n\n* a.b\n* c"]),
        (" one.\n", [" one."], [" one."]),
        ("one", ["one"], ["one"]),
        (
            "Dr. Ek met J. Lee. He left.",
            ["Dr. Ek met J. Lee.", "He left."],
            ["Dr. Ek met J. Lee.", "Dr. Ek met J. Lee. He left."],
        ),
        ("", [""], [""]),
    ],
)
def test_sentences(text, independent, cumulative):
    assert split_sentences(text, "none") == [text]
    assert split_sentences(text, "independent") == independent
    assert split_sentences(text, "cumulative") == cumulative


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Ek met Mr. Lee in the U.S. capital. ", "He left, e.g. at noon. ", '"Why?" she asked.'],
        ["Das kostet z. B. 3 Mio. Euro und ist nicht viel. ", "Er ging."],
        [
            "\u9686\u5fb7\u7684\u78e8\u574a\u3002",
            "\u5b83\u5efa\u4e8e\uff11\uff18\u5e74\uff01",
            "\u771f\u7684\u5417\uff1f",
        ],
        ["\u3053\u308c\u306f\u30da\u30f3\u3067\u3059\u3002", "\u306f\u3044\u3002"],
        ["\u092f\u0939 \u091a\u0915\u094d\u0915\u0940 \u0939\u0948\u0964 ", "\u0935\u0939 \u0939\u0948\u0964"],
    ],
)
def test_sentences_of_other_scripts_and_abbreviations(sentences):
    assert split_sentences("".join(sentences), "independent") == [sentence.strip() for sentence in sentences]


@given(st.text(alphabet="ab.!? \n", max_size=20))
def test_splitting_loses_nothing_but_space(text):
    parts, whole = split_sentences(text, "independent"), split_sentences(text, "cumulative")
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert len(parts) == len(whole)
    assert all(text.startswith(part) for part in whole)


def test_finetuning_on_sentences_is_finetuning_on_their_texts(llama):
    settings = FinetuneSettings(steps=2, batch_size=2)
    text = "the cat sat. who knows?"
    for splitting in ("independent", "cumulative"):
        split = finetune(llama, [text], replace(settings, splitting=splitting))
        assert split.losses == finetune(llama, split_sentences(text, splitting), settings).losses
    with pytest.raises(FinetuneError, match=r"^splitting: expected one of none, independent, cumulative, got 'words'$"):
        replace(settings, splitting="words")
