"""A causal language model of transformers, with its attention replaced by the trie's.

transformers supplies architecture, weights and tokenizer. Attention goes through its AttentionInterface to
ops.trie_attention, and ops.target_logprob is the head for the rows that need it. Knows no files, requests or documents.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from icl_ft_fast import ops
from icl_ft_fast.engine import conversion, trie
from icl_ft_fast.engine.defaults import CHUNK_TOKENS as CHUNK_TOKENS
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.memory import Footprint, Memory
from icl_ft_fast.engine.transfer import Sent, send
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.printable import printable

ATTENTION = "icl_ft_fast"
BLOCK_ROWS = 256  # rows in each forward of a batch-invariant model, the last ones perhaps zeros; fewer cost speed


class ModelError(UserError):
    """A model that cannot be loaded or served; the message says why and what to do."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one forward stand, in cache coordinates: row i sees key j <=> j <= row_q[i] < end_k[j].

    Attributes:
        token: int64 [T].
        depth_q: int32 [T], positions in their sequences.
        row_q: int32 [T], positions in the cache.
        end_k: int32 [S].
        depth_k: int32 [S].
        cache: where earlier keys are; None when the T rows see only each other (training).
        slots: int64 [T] cache positions to write to; None appends after the cache's rows.
        prefix: keys [p, G, D] and values [p, G, Dv] by layer of rows before all others, in place of a cache:
            differentiable.
        batch_invariant: whether to fill them up to a block and attend along each row's path, see ops.trie_attention.
        num_shared: see ops.TreeIndex.
        max_depth: see ops.TreeIndex.
        plans: what the layers' attention shares, see ops.trie_attention.
    """

    token: torch.Tensor
    depth_q: torch.Tensor
    row_q: torch.Tensor
    end_k: torch.Tensor
    depth_k: torch.Tensor
    cache: KVCache | None = None
    slots: torch.Tensor | None = None
    prefix: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    batch_invariant: bool = False
    num_shared: int = 0
    max_depth: int = 0
    plans: dict[Any, Any] = field(default_factory=dict, init=False)


def _trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    icl_rows: Rows | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention contract: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, Dv].

    What fills a block behind the rows neither attends nor is seen.
    """
    if icl_rows is None:
        raise ModelError("its attention drops the keyword `icl_rows`, so prefix-shared scores would be wrong")
    if attention_mask is not None:  # transformers makes none unless the attention asks for one
        raise ModelError("its attention builds its own mask, which may hide tokens that it should see")
    num_rows = icl_rows.row_q.shape[0]
    # Under autocast rotary embeddings leave q and k in float32.
    q, k, v = (t[0, :, :num_rows].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    if icl_rows.cache is not None:
        layer, rows = module.layer_idx, icl_rows.end_k.shape[0]
        if icl_rows.slots is None:
            k, v = icl_rows.cache.append(layer, k, v)  # type: ignore[arg-type]
        else:
            k, v = icl_rows.cache.write(layer, icl_rows.slots, k, v, rows)  # type: ignore[arg-type]
    if icl_rows.prefix is not None:
        k, v = (torch.cat(pair) for pair in zip(icl_rows.prefix[module.layer_idx], (k, v), strict=True))  # type: ignore[index]
    index = icl_rows.row_q, icl_rows.end_k, icl_rows.depth_q, icl_rows.depth_k
    tree = ops.TreeIndex(*index, icl_rows.num_shared, icl_rows.max_depth)
    options = ops.AttentionOptions(scaling, sliding_window, softcap, s_aux, icl_rows.batch_invariant)
    out = ops.trie_attention(q, k, v, tree, options, plans=icl_rows.plans)
    return _filled(out, query.shape[2])[None], None


def register_attention() -> None:
    """No mask goes with it: to make one, transformers would read the positions back from the device."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _trie_attention)


_forward = threading.local()  # is_ours: whether Model.forward runs, and not somebody's own forward of the network


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product = ops.linear if getattr(_forward, "is_ours", False) else torch.nn.functional.linear
    return product(x, layer.weight, layer.bias)


def register_linear(network: torch.nn.Module) -> None:
    """Let the linear layers of a network on a CPU go through ops.linear in Model.forward, and as before elsewhere."""
    for layer in network.modules():
        if type(layer) is torch.nn.Linear and layer.weight.device.type == "cpu":
            layer.forward = MethodType(_linear, layer)  # type: ignore[method-assign]


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The same with rows of zeros behind it, `rows` in all."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


@dataclass(frozen=True)
class Head:
    """The output head as ops.target_logprob takes it: logits = scale * (hidden @ weight.T + bias), soft-capped."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    batch_invariant: bool = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [R, V] after hidden [R, E]; for few rows, as decoding has them."""
        parts = [_filled(part, BLOCK_ROWS) for part in hidden.split(BLOCK_ROWS)] if self.batch_invariant else [hidden]
        products = [ops.linear(part, self.weight, self.bias) for part in parts]
        logits = products[0] if len(products) == 1 else torch.cat(products)  # megabytes: no copy that can be spared
        logits = logits[: len(hidden)].float()
        logits = logits if self.scale == 1 else logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


@dataclass(eq=False)
class Measured:
    """What has been worked out of a model's network, each once.

    Attributes:
        fingerprint: see Model.fingerprint().
        state: what it was taken of: training and merging make another state of the weights.
        footprint: see forward.footprint_of().
    """

    fingerprint: str = ""
    state: tuple[Any, ...] | None = None
    footprint: Footprint | None = None


@dataclass(frozen=True)
class Model:
    """A loaded network with its tokenizer.

    Attributes:
        network: the transformers model; its attention is the trie's.
        tokenizer: the transformers tokenizer.
        name: what load() was given.
        max_positions: the longest sequence the positions allow, in tokens.
        batch_invariant: whether a row's bits depend on its path alone, see load().
        memory: what scoring may take.
        adapter: what load() was given as adapter, which is merged into the weights; "" for none.
        measured: what has been worked out of it so far.
    """

    network: Any
    tokenizer: Any
    name: str
    max_positions: int
    batch_invariant: bool = False
    memory: Memory = field(default_factory=Memory)
    adapter: str = ""
    measured: Measured = field(default_factory=Measured, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.device
        return device

    @property
    def num_parameters(self) -> int:
        """Distinct weights (tied ones once)."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def quantization(self) -> str:
        """How the weights were quantised in the GGUF file that they were read from; "" where they were not."""
        origin = getattr(self.network.config, conversion.ORIGIN, None)
        found = origin.get("quantization") if isinstance(origin, dict) else None
        return printable(found) if isinstance(found, str) else ""

    @property
    def vocabulary(self) -> int:
        """Token ids that the network knows."""
        return int(self.network.get_input_embeddings().num_embeddings)

    def fingerprint(self) -> str:
        """Hex digest of config, vocabulary and weights: models with other scores have another one.

        Reads every weight, about a second a gigabyte, unless they are still what they were at the last call.
        """
        state = self._state()
        if state is None or self.measured.state != state:
            self.measured.fingerprint, self.measured.state = self._hashed(), state
        return self.measured.fingerprint

    def _state(self) -> tuple[Any, ...] | None:
        """What the fingerprint depends on, without reading the weights; None where that cannot be known."""
        tensors = list(self.network.state_dict(keep_vars=True).values())
        if any(tensor.is_inference() for tensor in tensors):  # they do not count how often they were written to
            return None
        # A reference, though weak, keeps the place of a storage from being given to another one.
        weights = tuple((StorageWeakRef(tensor.untyped_storage()), tensor._version) for tensor in tensors)
        described = str(self.network.config.to_dict()), len(self.tokenizer), self.memory.kv_dtype
        return weights, described, self.batch_invariant, torch.get_num_threads()

    def _hashed(self) -> str:
        config = {name: value for name, value in self.network.config.to_dict().items() if name[0] != "_"}
        described = [config, sorted(self.tokenizer.get_vocab().items()), self.tokenizer.special_tokens_map]
        if self.batch_invariant:  # its contexts have the bits of these alone
            described += [BLOCK_ROWS, torch.get_num_threads(), torch.__version__, torch.__config__.show()]
        described += [self.memory.kv_dtype] if self.memory.kv_dtype else []
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def body(self) -> Any:
        """The network without its head."""
        network = self.network
        return network.model if network.base_model is network else network.base_model

    @property
    def head(self) -> Head:
        """The output head with the config's scale and soft-cap."""
        linear, config = self.network.get_output_embeddings(), self.network.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        bias = getattr(linear, "bias", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, bias, float(scale), softcap, self.batch_invariant)

    def new_cache(self, capacity: int, folder: Path | None = None) -> KVCache:
        """An empty cache that keeps rows as `memory` says, in files in `folder` if there is one."""
        return KVCache(capacity, kv_dtype=self.memory.cache_dtype, folder=folder)

    def forward(self, rows: Rows) -> torch.Tensor:
        """Hidden states [T, E] of the rows, after the final norm; appends to rows.cache but does not commit."""
        hidden = []
        for block in _blocks(rows) if self.batch_invariant and rows.cache is not None else (rows,):
            num_rows = len(block.token)
            size = BLOCK_ROWS if block.batch_invariant else num_rows
            _forward.is_ours = True
            try:
                output = self.body(
                    input_ids=_filled(block.token, size)[None],
                    position_ids=_filled(block.depth_q, size)[None].long(),
                    use_cache=False,
                    icl_rows=block,
                )
            finally:
                _forward.is_ours = False
            hidden.append(output.last_hidden_state[0, :num_rows])
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def forward_chunk(self, chunk: trie.Chunk, cache: KVCache, sent: Sent | None = None) -> torch.Tensor:
        """Hidden states [T, E] of a planned chunk, whose ancestors are all that the cache holds; commits its rows.

        `sent` is the chunk on the device, where it is there already.
        """
        its = sent or send(chunk, self.device)
        rows = Rows(
            its.token,
            its.depth_k[chunk.cached_rows :],
            its.row_q,
            its.end_k,
            its.depth_k,
            cache,
            num_shared=its.num_shared,
            max_depth=its.max_depth,
        )
        hidden = self.forward(rows)
        cache.commit(chunk.last_row - chunk.first_row)
        return hidden

    def forward_tree(self, tree: trie.Trie) -> torch.Tensor:
        """Hidden states [T, E] of a whole tree at once, differentiable; for training."""
        device = self.device
        end, depth = tree.end.to(device), tree.depth.to(device)
        row_q = torch.arange(len(end), dtype=torch.int32, device=device)
        return self.forward(Rows(tree.token.to(device, torch.int64), depth, row_q, end, depth))

    def forward_behind(self, tree: trie.Trie, prefix: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Hidden states [T - 1, E] of a tree's rows behind its root, in whose place keys and values stand.

        Differentiable in `prefix`, which is keys [p, G, D] and values [p, G, Dv] by layer, of positions 0 to p - 1.
        """
        device, size = self.device, len(next(iter(prefix.values()))[0])
        depth = (tree.depth[1:] + (size - 1)).to(device)
        if not len(depth):
            return self.head.weight.new_zeros(0, self.head.weight.shape[1])
        before = torch.arange(size, dtype=torch.int32, device=device)
        row_q = torch.arange(size, size + len(depth), dtype=torch.int32, device=device)
        end = (tree.end + (size - 1)).to(device)
        end_k, depth_k = torch.cat([end[:1].expand(size), end[1:]]), torch.cat([before, depth])
        token = tree.token[1:].to(device, torch.int64)
        return self.forward(Rows(token, depth, row_q, end_k, depth_k, prefix=prefix))

    def target_logprob(
        self, hidden: torch.Tensor, row: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability float32 [M] of each target after its row of hidden [R, E], and whether it is the argmax."""
        head = self.head
        logp, is_argmax, _ = ops.target_logprob(
            hidden,
            head.weight,
            row.to(hidden.device),
            target.to(hidden.device),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            batch_invariant=head.batch_invariant,
        )
        return logp, is_argmax

    def target_logprob_sum(
        self, hidden: torch.Tensor, row: torch.Tensor, target: torch.Tensor, target_weight: torch.Tensor
    ) -> torch.Tensor:
        """The sum of target_weight [M] times what target_logprob() returns, for a loss."""
        head, exact = self.head, torch.promote_types(hidden.dtype, torch.float32)
        return ops.target_logprob_sum(
            hidden,
            head.weight,
            row.to(hidden.device),
            target.to(hidden.device),
            target_weight.to(hidden.device, exact),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
        )


def _blocks(rows: Rows) -> Iterator[Rows]:
    """The same rows, so many at a time that every matrix product has the same shape: that decides how it is summed."""
    for first in range(0, len(rows.row_q), BLOCK_ROWS):
        part = slice(first, first + BLOCK_ROWS)
        row_q = rows.row_q[part]
        yield replace(
            rows,
            token=rows.token[part],
            depth_q=rows.depth_q[part],
            row_q=row_q,
            slots=row_q.long(),
            batch_invariant=True,
        )
