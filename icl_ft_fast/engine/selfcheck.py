"""The proof that a loaded network scores as its own forward does: a small branching trie, both ways, on its weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from icl_ft_fast.engine import trie
from icl_ft_fast.engine.forward import hidden_states
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.model import ATTENTION, BLOCK_ROWS, Model, ModelError, Rows

# A branching trie: one prefix, two branches, one of which splits again; chunks of 7 rows exercise the cache.
_CHECK_PATHS = ((0, 10), (10, 15)), ((0, 10), (15, 22), (22, 24)), ((0, 10), (15, 22), (24, 28))
_CHECK_SHARED = 10
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


# Fields of a config that change the attention from some length on; set to _SHORT, the small trie goes beyond each.
_LENGTHS = re.compile(r"window|chunk|local|sparse|index_topk|block_size|compress_rate")
_NO_LENGTHS = re.compile(r"layer|pattern|num_|mamba|feed_forward")
_SHORT = 6


def check(model: Model) -> None:
    """Raise unless a small trie's hidden states, and the head, give what one plain forward per path gives.

    Once more with each length from which on the attention changes (a window, say) cut short: the trie then reaches it.
    """
    token, plain, logits = _check_tree(model, "on a small prefix tree")
    with _short_lengths(model) as names:
        if names:
            where = f"on a small prefix tree with {' and '.join(names)} of {_SHORT}"
            try:
                _check_tree(model, where)
            except (ModelError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a length that cannot be cut short cannot be looked at
                raise ModelError(f"{_refusal(model)}: {where} its own forward fails: {_first_line(error)}") from error
    rows = torch.arange(len(plain) - 1)
    with torch.inference_mode():
        logp, _ = model.target_logprob(plain, rows, token[1:])
    own = logits[:-1].float().log_softmax(-1).gather(-1, token[1:, None])[:, 0]
    worst, scale = (logp - own).abs().max().item(), own.abs().max().item()
    if not worst <= TOLERANCE[plain.dtype] * scale:
        raise ModelError(
            f"{_refusal(model)}: its output head's log-probabilities differ from its own by {worst:.1e} "
            f"(scale {scale:.1e})"
        )


def _refusal(model: Model) -> str:
    return f"{model.name}: {model.network.config.model_type}: this family cannot be served"


@torch.inference_mode()
def _check_tree(model: Model, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare a small trie with a forward a path; the last path's tokens, hidden states and logits by its own forward.

    In float32 every row must agree. bfloat16 rounds so much that a token can go to other experts, so there the median
    row beyond the shared prefix may be off by twice what the plain forward is from one of the same weights in float32.
    """
    network = model.network
    tokens = torch.randint(model.vocabulary, (28,), generator=torch.Generator().manual_seed(0)).tolist()
    paths = [[token for first, last in path for token in tokens[first:last]] for path in _CHECK_PATHS]
    tree = trie.build_from_lists([(path, []) for path in paths], whole=True)
    plan = trie.plan(tree, 7)
    cache = KVCache(plan.capacity)
    try:
        hidden = torch.cat([hidden for _, hidden in hidden_states(model, plan, cache)])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an attention that is not transformers' contract fails in its own way
        what = str(error) if isinstance(error, ModelError) else f"its code fails here ({_first_line(error)})"
        raise ModelError(f"{_refusal(model)}: {where}: {what}") from error
    exact = hidden.dtype == torch.float32
    errors, roundings = [], []
    network.set_attn_implementation("eager")
    try:
        for path, last_row in zip(paths, tree.last_row.tolist(), strict=True):
            rows = [last_row]
            while (parent := int(tree.parent[rows[-1]])) >= 0:
                rows.append(parent)
            token = torch.tensor(path, device=model.device)
            plain = model.body(token[None], use_cache=False).last_hidden_state[0]
            errors.append(_distance(hidden[rows[::-1]], plain))
            if not exact:
                with _in_float32(model.body):
                    unrounded = model.body(token[None], use_cache=False).last_hidden_state[0]
                roundings.append(_distance(plain, unrounded))
        logits = network(token[None], use_cache=False).logits[0]
    finally:
        network.set_attn_implementation(ATTENTION)
    if exact:
        worst, allowed = torch.cat(errors).max().item(), TOLERANCE[hidden.dtype]
    else:
        worst, allowed = (torch.cat([d[_CHECK_SHARED:] for d in x]).median().item() for x in (errors, roundings))
        allowed = 2 * allowed
    if not worst <= allowed:
        raise ModelError(
            f"{_refusal(model)}: {where} its hidden states differ from its own forward by {worst:.1e} of their size "
            f"({allowed:.1e} is rounding)"
        )
    return token, plain, logits


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def _short_lengths(model: Model) -> Iterator[list[str]]:
    """Within the block the lengths that change the attention are _SHORT, in configs and in modules; yields their names.

    One that no sequence of the model can reach stays.
    """
    body = model.body
    configs = {id(config): vars(config) for m in body.modules() if (config := getattr(m, "config", None)) is not None}
    places: list[tuple[dict[str, Any], str]] = []
    names, values = set(), set()
    for config in configs.values():
        for name in filter(_is_length, config):
            # Some families have one for each kind of layer.
            fields = (config[name], *config[name]) if isinstance(config[name], dict) else (config, name)
            for field in fields[1:]:
                if type(value := fields[0][field]) is int and _SHORT < value < model.max_positions:
                    places.append((fields[0], field))
                    names.add(name)
                    values.add(value)
    for module in body.modules():
        own = vars(module)
        places += [(own, name) for name in filter(_is_length, own) if type(own[name]) is int and own[name] in values]
    before = [own[name] for own, name in places]
    for own, name in places:
        own[name] = _SHORT
    try:
        yield sorted(names)
    finally:
        for (own, name), value in zip(places, before, strict=True):
            own[name] = value


def _is_length(name: str) -> bool:
    return bool(_LENGTHS.search(name)) and not _NO_LENGTHS.search(name)


@torch.inference_mode()
def plain_logits(network: Any, base: Any) -> torch.Tensor:
    """Float32 logits of a few tokens by the network's own forward; `base` is it without what peft wraps around it."""
    token = torch.arange(1, 25) * 7919 % base.get_input_embeddings().weight.shape[0]
    base.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = network(token[None].to(base.device), use_cache=False).logits[0].float()
        return logits
    finally:
        base.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def _in_float32(body: torch.nn.Module) -> Iterator[None]:
    """Within the block weights and what is made of them are float32, the weights one layer's at a time."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(layer: torch.nn.Module, _: Any) -> None:
        for weight in layer.parameters():
            kept[weight], weight.data = weight.data, weight.data.float()

    def restore(*_: Any) -> None:
        while kept:
            weight, values = kept.popitem()
            weight.data = values

    hooks = []
    for layer in _layers(body):
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(restore)]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


def _layers(body: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of a body's lists of them, and what stands beside these lists."""
    for child in body.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif any(isinstance(module, torch.nn.ModuleList) for module in child.modules()):
            yield from _layers(child)
        else:
            yield child


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b| of each row, float32."""
    distance: torch.Tensor = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)
    return distance


def check_can_be_invariant(model: Model) -> None:
    """Refuse what is known not to be: a GPU's kernels, and experts, whose products have as many rows as chose them."""
    if model.device.type != "cpu":
        raise ModelError(
            f"{model.name}: batch_invariant: not on {model.device}: a GPU's kernels sum in an order that depends on "
            "what is scored together; load it on the CPU, or without batch_invariant"
        )
    for name, value in model.network.config.get_text_config().to_dict().items():
        if "experts" in name and value:
            raise ModelError(
                f"{model.name}: batch_invariant: not for a mixture of experts ({name} = {value}): how many tokens an "
                "expert multiplies depends on what is scored together; load it without batch_invariant"
            )


@torch.inference_mode()
def prove_invariant(model: Model) -> None:
    """Raise unless a row has the same bits at every place of a block, and whatever stands at the others.

    A block is the same shapes each time; what is left is that kernels treat the ends of what they cut up differently.
    """
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(model.vocabulary, (BLOCK_ROWS,), generator=generator)
    row = torch.arange(BLOCK_ROWS, dtype=torch.int32)
    depth = torch.full_like(row, 7)

    def outputs(token: torch.Tensor) -> torch.Tensor:
        hidden = model.forward(Rows(token, depth, row, row + 1, depth, KVCache(BLOCK_ROWS)))
        return torch.cat([hidden.float(), model.head.logits(hidden)], 1)

    mixed, moved, alike = outputs(token), outputs(token.roll(1)), outputs(token[:1].expand(BLOCK_ROWS))
    if not torch.equal(moved.roll(-1, 0), mixed) or not torch.equal(alike, mixed[:1].expand_as(alike)):
        raise ModelError(
            f"{model.name}: batch_invariant: with {torch.get_num_threads()} threads of torch {torch.__version__} a "
            "row's bits depend on its place in a block or on its neighbours; try another number of threads "
            "(OMP_NUM_THREADS), or load it without batch_invariant"
        )
