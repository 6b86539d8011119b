"""The network under training: all of its weights or adapters, in one process or many, and the loss of a batch.

Knows no examples as text, no optimizer and no schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.model import Model
from icl_ft_fast.finetuning import distributed, lora
from icl_ft_fast.finetuning.batches import Batch
from icl_ft_fast.finetuning.distillation import Teacher
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings


class Objective(torch.nn.Module):
    """The summed loss of a batch's targets in nats: what DDP or FSDP wraps, output head included."""

    def __init__(self, model: Model, teacher: Teacher | None) -> None:
        super().__init__()
        self.network, self._model, self._teacher = model.network, model, teacher

    def forward(self, batch: Batch, examples: Sequence[int]) -> torch.Tensor:
        """Negative log-likelihood of the targets, or KL to the teacher, which knows the batch's examples by index."""
        hidden = self._model.forward_tree(batch.tree)
        if len(batch.head_row) < len(hidden):
            hidden = hidden[batch.head_row.to(hidden.device)]
        if self._teacher is not None:
            row = batch.row[batch.target_index].to(hidden.device)
            # Targets share rows. The backward of hidden[row] adds to one from several threads, in any order.
            return self._teacher.divergence(hidden.index_select(0, row), self._model.head, examples)
        times = batch.target_index.bincount(minlength=len(batch.target))
        return -self._model.target_logprob_sum(hidden, batch.row, batch.target, times)


class NetworkInTraining:
    """A network with what is trained in it.

    Args:
        model: what training starts from; its network is copied unless in_place.
        checkpoint: a folder whose weights are taken instead, of a run with the same settings.

    Attributes:
        network: what transformers made, adapters injected.
        student: the model around it, as it is now.
        adapters: peft's wrapper around it, or None where all weights are trained.
        objective: the loss of a batch, see Objective; with several processes, wrapped by DDP or FSDP.
        passes, rows_before: see run.InTraining.
    """

    passes, rows_before = 3, 0

    def __init__(
        self,
        model: Model,
        settings: FinetuneSettings,
        seed: int,
        *,
        teacher: Teacher | None = None,
        in_place: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        self.network = model.network if in_place else copy.deepcopy(model.network)
        self.adapters = None if settings.lora is None else lora.inject(self.network, settings.lora, seed)
        if checkpoint is not None:
            self._load(checkpoint)
        self.student = from_network(self.network, model.tokenizer, model.name, self_check=False, memory=model.memory)
        self.objective = distributed.wrap(Objective(self.student, teacher), self.network, fsdp=settings.fsdp)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._model.device

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the network, gathered from all processes, which must all ask for it."""
        return distributed.whole_weights(self.adapters or self.network, lora.PART if self.adapters else "")

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the network with these weights, or its adapters, and the tokenizer into a folder."""
        (self.adapters or self.network).save_pretrained(folder, state_dict=weights)
        if self.adapters is not None:
            lora.name_base(folder, self._model.adapter or self._model.name)
        self._model.tokenizer.save_pretrained(folder)

    def finished(self, checkpoint: Path | None) -> Model:
        """The trained model, adapters merged; this object is not to be used afterwards.

        Args:
            checkpoint: the folder of the weights to return; None returns the weights as they are now.
        """
        if self._settings.fsdp:
            assert checkpoint is not None
            self._unshard(checkpoint)
        elif checkpoint is not None:
            self._load(checkpoint)
        network = self.network if self.adapters is None else self.adapters.merge_and_unload(safe_merge=True)
        network.requires_grad_(True)
        given = self._model
        return from_network(
            network,
            given.tokenizer,
            given.name,
            self_check=False,
            batch_invariant=given.batch_invariant,
            memory=given.memory,
        )

    def _load(self, folder: Path) -> None:
        """Give the network, or its adapters, the weights of a checkpoint."""
        if self.adapters is not None:
            lora.load(self.adapters, folder)
        else:
            self.network.load_state_dict(self._read(folder).state_dict())

    def _read(self, folder: Path) -> Any:
        """A network of the same class and dtype with the weights of a checkpoint."""
        return type(self.network).from_pretrained(folder, dtype=self.network.dtype, use_safetensors=True)

    def _unshard(self, folder: Path) -> None:
        """Replace the sharded network by a whole one with the weights of a checkpoint."""
        if self._settings.lora is None:
            self.network = self._read(folder)
        else:
            self.network = lora.base(self.network, distributed.whole_weights(self.network))
            self.adapters = lora.inject(self.network, self._settings.lora, self._seed)
            self._load(folder)


@contextmanager
def recomputing(network: Any, is_wanted: bool) -> Iterator[None]:
    """Within the block each layer keeps only its input, if wanted, and runs again in the backward pass.

    Raises:
        FinetuneError: it is wanted and this family's layers do not offer it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)] if is_wanted else []
    if is_wanted and not layers:
        raise FinetuneError("gradient_checkpointing: not supported by this model family")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
