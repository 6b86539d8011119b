"""AdamW, and its state as named tensors."""

from __future__ import annotations

from typing import Any

import torch

from icl_ft_fast.finetuning import distributed
from icl_ft_fast.finetuning.settings import FinetuneSettings


class Optimizer:
    """AdamW on float32 weights: the network's own, or copies that bfloat16 ones are rounded from."""

    def __init__(self, network: Any, settings: FinetuneSettings) -> None:
        self.weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.weights.items()
        }
        self._adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True if settings.optim == "adamw_torch_fused" else None,
        )

    def gather(self) -> None:
        """Add what the last backward left in bfloat16 weights to their copies' gradients."""
        for weight, master in zip(self.weights.values(), self.masters.values(), strict=True):
            if master is not weight and weight.grad is not None:
                grad, weight.grad = weight.grad.float(), None
                master.grad = grad if master.grad is None else master.grad + grad

    def clip(self, norm: float) -> float:
        """The norm of all gradients, which are then scaled down to `norm` if above it."""
        found = torch.nn.utils.clip_grad_norm_(self.masters.values(), norm)
        return float(distributed.whole(found))

    def step(self, rate: float) -> None:
        """Update the weights and forget the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights.values(), self.masters.values(), strict=True):
                if master is not weight:
                    weight.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on beside the network's weights, by "kind/name of the weight"."""
        state = {
            f"{kind}/{name}": distributed.whole(tensor).contiguous()
            for name, master in self.masters.items()
            for kind, tensor in self._adamw.state[master].items()
        }
        copies = {name: m for name, m in self.masters.items() if m is not self.weights[name]}
        return state | {f"master/{name}": distributed.whole(m).contiguous() for name, m in copies.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from what state() returned."""
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            master = self.masters[name]
            if kind == "master":
                with torch.no_grad():
                    master.copy_(distributed.shard_like(tensor, master))
            else:
                shard = distributed.shard_like(tensor, master) if tensor.shape == master.shape else tensor
                # A fused AdamW reads the number of steps too where the weights are.
                self._adamw.state[master][kind] = shard.to(master.device) if self._adamw.defaults["fused"] else shard
