"""Triton's interpreter, made to compute what a GPU computes.

It keeps bfloat16 as raw bits, which matrix products, arithmetic and reductions take for integers, and cuts float32 off
where a GPU rounds it; it ignores how float32 products are to be made; and it knows no libdevice. It also looks through
the whole language at every call of a function, which is a third of its time: here once a launch. `counted` counts what
kernels do.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _float32(handle: Any) -> Any:
    """bfloat16 bits as float32; anything else as it is."""
    if not _is_bfloat16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bfloat16(values: np.ndarray) -> Any:
    """float32 rounded to the nearest bfloat16, ties to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16()
    return Handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _thirds(values: np.ndarray) -> list[np.ndarray]:
    """float32 as the sum of three bfloat16."""
    parts = []
    for _ in range(3):
        parts.append(_float32(_bfloat16(values)).data)
        values = values - parts[-1]
    return parts


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Six products of bfloat16 for one of float32, as the option bf16x6 says."""
    if a.dtype != np.float32:
        return np.matmul(a, b)
    (a_high, a_middle, a_low), (b_high, b_middle, b_low) = _thirds(a), _thirds(b)
    pairs = (a_middle, b_middle), (a_high, b_low), (a_low, b_high), (a_high, b_middle), (a_middle, b_high)
    return sum((np.matmul(*pair) for pair in pairs), np.float32(0)) + np.matmul(a_high, b_high)


@cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of the language that a function sees, which the interpreter replaces while a kernel runs."""
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


def _patch_once_a_launch() -> None:
    patch, scope_type, patched = interpreter._patch_lang, interpreter._LangPatchScope, set()

    class Launch(scope_type):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    def patch_once(function: Any) -> Any:
        languages = _languages(function)
        if languages in patched:  # by the kernel, or by a function that it called before
            return scope_type()
        scope = patch(function)
        if not patched:
            scope.__class__ = Launch
        patched.add(languages)
        return scope

    interpreter._patch_lang = patch_once


def install() -> None:
    """Patch the interpreter, for the whole process; again does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_as_a_gpu", False):
        return
    builder.rounds_as_a_gpu = True
    precisions = ("ieee", "bf16x6")
    object.__setattr__(interpreter.interpreter_builder.options, "allowed_dot_input_precisions", precisions)
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    cast_impl, create_fp_to_fp, reduce = builder.cast_impl, builder.create_fp_to_fp, interpreter.ReduceOps.apply_impl

    def dot(self: Any, a: Any, b: Any, addend: Any, *_: Any) -> Any:
        factors = [_float32(x).data for x in (a, b)]
        if factors[0].dtype == np.float16:
            factors = [x.astype(np.float32) for x in factors]
        elif a.dtype.scalar != tl.bfloat16:
            return Handle(_product(*factors) + addend.data, addend.dtype.scalar)
        return Handle(np.matmul(*factors) + addend.data, addend.dtype.scalar)

    def binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        result = binary_op(self, _float32(a), _float32(b), op)
        return _bfloat16(result.data) if _is_bfloat16(a) and result.data.dtype == np.float32 else result

    def unary(self: Any, a: Any, op: Any) -> Any:
        result = unary_op(self, _float32(a), op)
        return _bfloat16(result.data) if _is_bfloat16(a) and result.data.dtype == np.float32 else result

    def ternary(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where or not _is_bfloat16(b):  # a choice between raw bits is right
            return ternary_op(self, a, b, c, op)
        return _bfloat16(ternary_op(self, *map(_float32, (a, b, c)), op).data)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return _bfloat16(source.data.astype(np.float32))
        if _is_bfloat16(source) and target.scalar == tl.float32:
            return _float32(source)
        return cast_impl(self, source if target.scalar == tl.bfloat16 else _float32(source), target)

    def round_float(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return _bfloat16(source.data)
        return create_fp_to_fp(self, source, target, mode)

    def no_bfloat16(self: Any, given: Any) -> Any:
        handles = [x.handle for x in (given if isinstance(given, tuple) else (given,))]
        assert not any(map(_is_bfloat16, handles)), "kernels reduce in float32"
        return reduce(self, given)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = dot, cast, round_float
    builder.binary_op, builder.unary_op, builder.ternary_op = binary, unary, ternary
    interpreter.ReduceOps.apply_impl = no_bfloat16
    _patch_once_a_launch()
    libdevice.tanh = lambda x: tl.tensor(Handle(np.tanh(x.handle.data), x.dtype.scalar), x.type)


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """By kernel: FLOPs of matrix products, bytes loaded, bytes stored."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    running = ""
    call, dot, load, store = (
        executor.__call__,
        builder.create_dot,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def count_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal running
        running = self.fn.__name__
        call(self, *args, **kwargs)

    def count_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counts[running][0] += 2 * a.data.shape[0] * b.data.size
        return dot(self, a, b, *rest)

    def count_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counts[running][1] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def count_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts[running][2] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(executor, "__call__", count_call),
        mock.patch.multiple(
            builder, create_dot=count_dot, create_masked_load=count_load, create_masked_store=count_store
        ),
    ):
        yield counts
