"""LoRA through peft: configuration, injection and files, which PeftModel.from_pretrained reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from icl_ft_fast.finetuning.settings import FinetuneError, LoraSettings
from icl_ft_fast.runtime.durable import replacing

PART = ".lora_"  # of the names of adapters' weights


def base(network: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The network as it was before inject(), from all weights that it has now, which may be sharded in it."""
    before = {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if PART not in name}
    return type(network).from_pretrained(None, config=network.config, state_dict=before, dtype=network.dtype)


def inject(network: Any, settings: LoraSettings, seed: int) -> Any:
    """Put fresh adapters into the network, in place, and freeze the rest; returns the PeftModel around it.

    Raises:
        FinetuneError: peft is not installed, or target modules do not exist, or are the head or the embeddings.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise FinetuneError("lora: needs peft: pip install 'icl_ft_fast[lora]'") from error
    targets = settings.target_modules
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        task_type="CAUSAL_LM",
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        try:
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's
            adapted = peft.get_peft_model(network, config)
        except ValueError as error:
            raise FinetuneError(f"target_modules: {error}") from error
    for name in ("get_output_embeddings", "get_input_embeddings"):
        if isinstance(getattr(network, name)(), peft.tuners.tuners_utils.BaseTunerLayer):
            raise FinetuneError("target_modules: LoRA does not support the output head or the embeddings")
    if not (settings.use_dora or settings.lora_dropout):
        for module in network.modules():
            if isinstance(module, peft.tuners.lora.Linear) and type(module.base_layer) is torch.nn.Linear:
                module.forward = partial(_adapted, module)
    return adapted


def _adapted(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What forward() of peft's adapted linear layer returns, by fewer and cheaper operations."""
    base, (name,) = module.base_layer, module.active_adapters
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    out: torch.Tensor = _LowRankLinear.apply(x.flatten(0, -2), base.weight, base.bias, a, b, module.scaling[name])
    return out.view(*x.shape[:-1], -1)


class _LowRankLinear(torch.autograd.Function):
    """x @ W.T + bias + scale * x @ A.T @ B.T for x [T, in], W [out, in] and bias frozen, A [r, in] and B [out, r].

    autograd would pass over [T, in] and [T, out] some ten times more, to scale and to add; here products add to what
    is there. Products with A and B are made in the dtype of A, as peft makes them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        a, b, ctx.scale = rest
        low = x.to(a.dtype).mm(a.t()).mul_(ctx.scale)
        ctx.save_for_backward(x, weight, a, b, low)
        return _plus_product(torch.nn.functional.linear(x, weight, bias), low, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        exact = grad.to(a.dtype)
        grad_low = exact.mm(b).mul_(ctx.scale)
        grad_x = _plus_product(grad.mm(weight), grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.t().mm(x.to(a.dtype)), exact.t().mm(low), None


def _plus_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum out + left @ right in the dtype of out, in whose memory it is where that can be."""
    if out.dtype == left.dtype:
        return out.addmm_(left, right)
    return torch.addmm(out.to(left.dtype), left, right).to(out.dtype)


def name_base(folder: Path, name: str) -> None:
    """Have an adapter's folder name its base as the user did, not as the folder that transformers read it from."""
    path = folder / "adapter_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["base_model_name_or_path"] = str(Path(name).absolute()) if Path(name).exists() else name
    with replacing(path) as partial:
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(adapted: Any, folder: Path) -> None:
    """Give the adapters the weights of a folder that save_pretrained wrote."""
    import peft
    from safetensors.torch import load_file

    peft.set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors"))


@contextmanager
def dropping_out(network: Any, seed: int) -> Iterator[None]:
    """Within the block the adapters' inputs drop out, drawn from a seed; torch's own generator is left as it was."""
    modules = [module for name, module in network.named_modules() if ".lora_dropout." in name]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for module in modules:
            module.training = True
        try:
            yield
        finally:
            for module in modules:
                module.training = False
