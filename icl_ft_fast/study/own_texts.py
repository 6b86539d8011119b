"""Texts that a model writes by itself, after nothing: what it was before it learned anything."""

from __future__ import annotations

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.runtime.errors import UserError

TEXTS, TEXT_TOKENS = 32, 64  # how many are measured on, and the length of each


class HarmError(UserError):
    """A general task without known answers, or a model that writes nothing; the message says which."""


def own_texts(
    model: Model,
    seed: int,
    *,
    journal: ResultJournal | None = None,
    num_texts: int = TEXTS,
    tokens: int = TEXT_TOKENS,
    ledger: Ledger | None = None,
) -> list[list[int]]:
    """Token ids of texts that a model writes after nothing, sampled at temperature 1; the same each time.

    Args:
        model: from load().
        seed: of the draws.
        journal: where texts are looked up and put, with the work they took.
        num_texts: some may be shorter than `tokens`, and those without a token are left out.
        tokens: the most of each text.
        ledger: counts the work.

    Raises:
        HarmError: the model wrote nothing.
    """
    own = Ledger(meter=ledger.meter if ledger is not None else None)

    def write() -> dict[str, object]:
        prompt = [encoding.prefix_token_id(model.tokenizer)]
        draws = [Sampling(max_new_tokens=tokens, temperature=1.0, seed=seed * num_texts + t) for t in range(num_texts)]
        texts = [list(made.ids) for made in generate(model, [prompt] * num_texts, draws, ledger=own) if made.ids]
        return {"texts": texts, "counts": own.as_dict()}

    key = digest("own texts 2", model.fingerprint(), seed, num_texts, tokens)
    found = (journal or ResultJournal(None)).once(key, write)
    texts: list[list[int]] = found["texts"]
    if not texts:
        raise HarmError(f"{model.name}: writes nothing of its own, so what changes in it cannot be measured")
    if ledger is not None:
        ledger.include(found["counts"])
    return texts
