"""The one error budget: twice what plain PyTorch at the same dtype is off by, plus a unit of rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_close(kernel: Tensor, same_dtype: Tensor, exact64: Tensor, name: str = "result") -> None:
    """|kernel - exact64| <= 2 * (|same_dtype - exact64| + eps * max|exact64|), maxima over the tensor.

    eps is that of the kernel's dtype. Infinities must stand where they stand in exact64, and nothing may be nan.
    """
    assert kernel.shape == exact64.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact64.shape)}"
    assert exact64.dtype == torch.float64
    finite = exact64.isfinite()
    assert torch.equal(kernel[~finite].double(), exact64[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    exact64 = exact64[finite]
    kernel_error = (kernel[finite].double() - exact64).abs().max().item()
    same_dtype_error = (same_dtype[finite].double() - exact64).abs().max().item()
    rounding = torch.finfo(kernel.dtype).eps * exact64.abs().max().item()
    assert kernel_error <= 2 * (same_dtype_error + rounding), (
        f"{name}: |kernel - exact64| = {kernel_error:.3e} > 2 * (|same dtype - exact64| = {same_dtype_error:.3e}"
        f" + eps * max|exact64| = {rounding:.3e})"
    )


def furthest(tensors: Sequence[Tensor], exact: Tensor) -> Tensor:
    """The one whose greatest error is greatest."""
    return max(tensors, key=lambda x: max((x.double() - exact)[exact.isfinite()].abs().tolist(), default=0))
