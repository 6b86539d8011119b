"""What an op's arguments must be: symbolic shapes, dtypes, one device. Errors name op, argument, expected and got."""

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
PLANNED = ("cuda",)  # devices whose attention kernels walk over lists of tiles
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = (torch.float32, torch.bfloat16)  # what the C++ serves: the dtypes that networks run in on a CPU
INTS = (torch.int32, torch.int64)


def check_tensors(op: str, **arguments: tuple[Tensor, str, tuple[torch.dtype, ...]]) -> dict[str, int]:
    """The size of each letter; raises unless sizes agree, dtypes fit and all tensors are on one device.

    Args:
        op: the op's name, which starts every message.
        arguments: by name the tensor, its dimensions as letters ("T H D") and the dtypes allowed; no dtypes means the
            first tensor's.
    """
    sizes: dict[str, int] = {}
    first: Tensor | None = None
    for name, (tensor, letters, dtypes) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} expected a tensor, got {type(tensor).__name__}")
        if first is None:
            first = tensor
            if tensor.device.type not in (*DEVICES, "meta"):
                raise NotImplementedError(
                    f"{op}: {name} expected on a device of type {', '.join(DEVICES)}, got {tensor.device}"
                )
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} expected on {first.device} like the other tensors, got {tensor.device}")
        if tensor.dtype not in (allowed := dtypes or (first.dtype,)):
            raise TypeError(f"{op}: {name} expected {' or '.join(map(str, allowed))}, got {tensor.dtype}")
        dims, shape, num_known = letters.split(), tensor.shape, len(sizes)
        fits = len(dims) == len(shape)
        for letter, n in zip(dims, shape, strict=False):
            fits = sizes.setdefault(letter, n) == n and fits
        if not fits:
            known = ", ".join(f"{letter} = {n}" for letter, n in [*sizes.items()][:num_known] if letter in dims)
            expected = f"[{', '.join(dims)}]{' with ' if known else ''}{known}"
            raise ValueError(f"{op}: {name} expected shape {expected}, got {list(shape)}")
    return sizes


def check_softcap(op: str, softcap: float | None) -> float:
    """The soft-cap as schemas have it, 0 for none; raises unless it is None or above 0."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap expected None or a number above 0, got {softcap}")
    return softcap or 0.0


def check_invariant(op: str, tensor: Tensor) -> None:
    """Raises unless there is a batch-invariant kernel for a tensor's device and dtype."""
    if tensor.device.type == "cuda" or tensor.dtype not in NATIVE:
        raise NotImplementedError(
            f"{op}: batch_invariant expected False for {tensor.dtype} on {tensor.device}: only the CPU's C++, which "
            "serves float32 and bfloat16, keeps a row's bits apart from what is beside it"
        )
