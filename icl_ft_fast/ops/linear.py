"""A linear layer whose rows may be few, as decoding has them: not an op of its own, but torch's with a faster road.

A general matrix product packs the weight anew for every call, which takes most of the time where few rows share it. The
C++ of csrc/linear.cpp reads the weight where it lies, once.
"""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear as general

from icl_ft_fast.ops import cpu
from icl_ft_fast.ops.checks import NATIVE

# Rows that the C++ takes less time for than torch, measured on two cores: up to 63 with AVX-512; 8, but not 40, with
# AVX2; none without either.
FEW = range(2, {1: 2, 2: 9}.get(cpu.BEST_ISA, 64))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x @ weight.T + bias, as torch.nn.functional.linear has it.

    Args:
        x: [..., E].
        weight: [O, E], the dtype of x.
        bias: [O], or None.

    Returns:
        [..., O], the dtype of x. Of few rows on a CPU in float32 or bfloat16, where no gradient is recorded and nothing
        compiled, in C++: summed in float32, in bits that do not depend on the rows beside or the threads. Else torch's.
    """
    if torch.compiler.is_compiling() or (rows := x.numel() // (x.shape[-1] or 1)) not in FEW:
        return general(x, weight, bias)
    plain = type(x) is Tensor and type(weight) in (Tensor, Parameter) and x.is_cpu
    unrecorded = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if not plain or not unrecorded or x.dtype not in NATIVE:
        return general(x, weight, bias)
    if weight.dtype != x.dtype or weight.stride(-1) != 1 or (bias is not None and not bias.is_contiguous()):
        return general(x, weight, bias)
    return cpu.linear(x.reshape(rows, -1).contiguous(), weight, bias).view(*x.shape[:-1], len(weight))
