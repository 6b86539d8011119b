"""FLOPs and bytes of a network's forward, from its shapes. Knows no request and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from icl_ft_fast.engine.model import Model


@dataclass(frozen=True)
class Work:
    """What a forward of a network computes and must at least move, from shapes; what it holds is memory.Footprint.

    Attributes:
        row_flops: of a row's products with the body's weights; of a mixture of experts, with those it is sent to.
        head_flops: of a row's product with the output head.
        attention: for each layer its sliding window, or None, and the FLOPs of one query and one key it sees.
        weight_bytes: of all weights.
        kv_row_bytes: keys and values of a row, all layers.
    """

    row_flops: int
    head_flops: int
    attention: tuple[tuple[int | None, int], ...]
    weight_bytes: int
    kv_row_bytes: int

    def flops(self, depth_T: Tensor, head_rows: int) -> int:
        """FLOPs of a forward: 2 for each weight a row meets, 2 (D + Dv) for each query head and visible key.

        A row at depth d sees d + 1 keys, or its window's. Norms, rotations and softmaxes are not counted, nor is what
        an attention kernel computes of a tile and throws away.
        """
        seen = depth_T.long() + 1
        windows = {window for window, _ in self.attention}
        pairs = {window: int((seen if window is None else seen.clamp(max=window)).sum()) for window in windows}
        attention = sum(pairs[window] * flops for window, flops in self.attention)
        return len(seen) * self.row_flops + head_rows * self.head_flops + attention

    def path_flops(self, rows: int) -> NDArray[np.float64]:
        """FLOPs of the first 0, 1, ..., `rows` rows of a sequence, [rows + 1], without the head."""
        seen = np.arange(1, rows + 1, dtype=np.float64)
        each = self.row_flops + sum(flops * np.minimum(seen, window or rows) for window, flops in self.attention)
        return np.concatenate([[0.0], np.cumsum(each)])


def work_of(model: Model) -> Work:
    """The work of a loaded model's network."""
    config = model.network.config.get_text_config()
    heads, windows = config.num_attention_heads, _windows(config)
    sizes = _head_sizes(model, len(windows))  # of keys, of values, and key/value heads, for each layer
    head, body = model.head.weight, model.body
    embedded = {id(p) for m in body.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = [p for p in body.parameters() if p.dim() > 1 and id(p) not in embedded]
    return Work(
        row_flops=sum(2 * _met(parameter.numel(), parameter.dim(), config) for parameter in weights),
        head_flops=2 * head.numel(),
        attention=tuple((w, 2 * heads * (key + value)) for w, (key, value, _) in zip(windows, sizes, strict=True)),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.network.parameters()),
        kv_row_bytes=sum(groups * (key + value) for key, value, groups in sizes) * head.element_size(),
    )


def heads_of(model: Model) -> tuple[int, set[tuple[int, int, int]]]:
    """Query heads; and the sizes of a key's and of a value's head and key/value heads that its layers have."""
    config = model.network.config.get_text_config()
    return config.num_attention_heads, set(_head_sizes(model, len(_windows(config))))


def _head_sizes(model: Model, num_layers: int) -> list[tuple[int, int, int]]:
    """For each layer with attention the size of a key and of a value, and how many of each there are."""
    config = model.network.config.get_text_config()
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # deepseek: latent attention expands to one key and value a head
        return [(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim, heads)] * num_layers
    try:
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
    except RuntimeError:  # gemma4: the layers differ, and the config does not tell for all at once
        layers = {m.layer_idx: m for m in model.body.modules() if {"layer_idx", "head_dim"} <= vars(m).keys()}
        its = [layers[layer] for layer in sorted(layers)]
        return [(m.head_dim, m.head_dim, heads // getattr(m, "num_key_value_groups", 1)) for m in its]
    return [(size, size, groups)] * num_layers


def _met(numel: int, dims: int, config: Any) -> int:
    """The weights of a parameter that a row meets: of stacked experts [experts, ..., ...], those chosen for it."""
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
    return numel * chosen // experts if dims == 3 and chosen and experts else numel


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer that has attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds if kind.endswith("attention")]
