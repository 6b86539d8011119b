"""What a request of lm-evaluation-harness says: what to call it, and how it wants to be continued."""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from icl_ft_fast.engine.generate import GenerateError, Sampling

MAX_GEN_TOKS = 256  # the harness's default
# The harness's names of generation settings, which are transformers', and ours.
GENERATION = {key: key for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")} | {
    "no_repeat_ngram_size": "no_repeat_ngram"
}
ONLY_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "seed")


def request_name(request: Instance) -> str:
    """What errors call a request."""
    return f"{request.task_name}, document {request.doc_id}, request {request.idx}"


def sampling_of(request: Instance, repeat: int) -> Sampling:
    """How to continue a request in its repeat-th repetition; raises GenerateError for what is not served."""
    asked = dict(normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS))
    until, size, is_sampled = asked.pop("until"), asked.pop("max_gen_toks"), asked.pop("do_sample")
    given = {ours: asked.pop(theirs) for theirs, ours in GENERATION.items() if asked.get(theirs) is not None}
    if is_sampled:
        given["temperature"] = float(given.get("temperature", 1.0))
        given["seed"] = given.get("seed", 0) + repeat
        if not given["temperature"]:
            raise GenerateError(
                f"{request_name(request)}: generation_kwargs: do_sample=true needs a temperature above 0"
            )
    else:
        given = {key: value for key, value in given.items() if key not in ONLY_SAMPLED}
        asked.pop("typical_p", None)
    if unknown := sorted(asked):
        raise GenerateError(f"{request_name(request)}: generation_kwargs: {', '.join(unknown)}: not served")
    try:
        return Sampling(size, stop=tuple(text for text in until if text), **given)
    except GenerateError as error:
        raise GenerateError(f"{request_name(request)}: generation_kwargs: {error}") from error
