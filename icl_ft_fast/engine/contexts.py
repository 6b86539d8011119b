"""Saved contexts: prefix caches on disk. What a model made of a long prefix, in files that later processes start from.

A file is safetensors: token [S], hidden [S, E] and each layer's keys and values, under a fingerprint of config,
vocabulary, weights and their dtype, with a checksum of it all. It is mapped, not copied; the checksum reads it once.
A store is a folder of such files under a byte limit; processes share it through a lock on the folder.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from icl_ft_fast.engine.kv_cache import Context, KVCache
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import locked, replacing
from icl_ft_fast.runtime.errors import UserError

_log = logging.getLogger(__name__)

FORMAT = "icl_ft_fast context 1"
_PROMISED: dict[str, type] = {
    "label": str,
    "model": str,
    "fingerprint": str,
    "num_tokens": int,
    "token_digest": str,
}


class ContextError(UserError):
    """A saved context that cannot be used; the message names the file."""


@dataclass(frozen=True)
class SavedContext:
    """What a file says of itself.

    Attributes:
        path: the file; its name without the ending is the context's id.
        label: free text of whoever saved it.
        model: the model's name when it was saved.
        fingerprint: of the model, see Model.fingerprint().
        num_tokens: tokens of the context.
        token_digest: of their ids.
        checksum: of every tensor's bytes and of the above.
        num_bytes: size of the file.
        used: when it was last loaded or saved, seconds since the epoch.
    """

    path: Path
    label: str
    model: str
    fingerprint: str
    num_tokens: int
    token_digest: str
    checksum: str
    num_bytes: int
    used: float

    @property
    def id(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def save_context(path: str | Path, model: Model, context: Context, *, label: str = "", fingerprint: str = "") -> None:
    """Write a context atomically: a file of this name is whole or not there.

    Args:
        path: ends in .safetensors; replaced if it exists.
        model: made the context.
        context: from score.prefill().
        label: free text, shown by lists.
        fingerprint: model.fingerprint(), where the caller knows it already; it takes a second a gigabyte.

    Examples:
        >>> model = iff.load("shipped")
        >>> context = iff.prefill(model, model.tokenizer("glon are wide.")["input_ids"])
        >>> iff.save_context("context.safetensors", model, context)
    """
    tensors = _tensors(context)
    about = {
        "format": FORMAT,
        "label": label,
        "model": model.name,
        "fingerprint": fingerprint or model.fingerprint(),
        "num_tokens": len(context.token),
        "token_digest": _digest(context.token),
    }
    about["checksum"] = _checksum(tensors, about)
    try:
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, metadata={"icl_ft_fast": json.dumps(about)})
    except SafetensorError as error:
        raise ContextError(f"{path}: cannot be written: {error}") from error


def read_header(path: Path) -> SavedContext:
    """What a file says of itself; reads its header only.

    Raises:
        ContextError: not a saved context, or cut short.
    """
    with _opened(path) as file:
        try:
            about = json.loads((file.metadata() or {})["icl_ft_fast"])
            known = about.pop("format") == FORMAT
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ContextError(f"{path}: not a saved context") from error
    names: dict[str, type] = dict.fromkeys(("label", "model", "fingerprint", "token_digest", "checksum"), str)
    names["num_tokens"] = int
    if not known or about.keys() != names.keys() or any(type(about[name]) is not kind for name, kind in names.items()):
        raise ContextError(f"{path}: not a saved context of the form {FORMAT!r}")
    stat = path.stat()
    return SavedContext(path, **about, num_bytes=stat.st_size, used=stat.st_mtime)


def load_context(path: str | Path, model: Model, *, fingerprint: str = "", like: Context | None = None) -> Context:
    """Map a saved context for the model that made it.

    Args:
        path: from save_context().
        model: the same model, by fingerprint.
        fingerprint: model.fingerprint(), where the caller knows it already.
        like: any context of the model; where it is given, the file's tensors must have its layers, shapes and dtypes.

    Raises:
        ContextError: another model's, another form, damaged, or not what the header promises.

    Examples:
        >>> model = iff.load("shipped")
        >>> iff.save_context("context.safetensors", model, iff.prefill(model, [1, 2, 3]))
        >>> len(iff.load_context("context.safetensors", model).token)
        3
    """
    saved = read_header(Path(path))
    if saved.fingerprint != (fingerprint or model.fingerprint()):
        raise ContextError(
            f"{path}: saved from {saved.model!r} with other weights, config, vocabulary or dtype than {model.name!r}"
        )
    tensors = _checked(saved)
    expected = {} if like is None else {name: (t.shape[1:], t.dtype) for name, t in _tensors(like).items()}
    found = {name: (t.shape[1:], t.dtype) for name, t in tensors.items()}
    rows = {t.shape[:1] for t in tensors.values()}
    if rows != {(saved.num_tokens,)} or (expected and found != expected):
        raise ContextError(f"{path}: its tensors are not those of {saved.num_tokens} tokens of {model.name!r}")
    token = tensors.pop("token").numpy()
    if _digest(token) != saved.token_digest:
        raise ContextError(f"{path}: its tokens are not those that its header names")
    hidden = tensors.pop("hidden").to(model.device)
    layers = {int(name.partition(".")[2]) for name in tensors}
    cache = KVCache.of(
        {n: (tensors[f"keys.{n}"].to(model.device), tensors[f"values.{n}"].to(model.device)) for n in sorted(layers)}
    )
    return Context(token, hidden, cache)


def verify(path: Path) -> SavedContext:
    """Read a file whole and hold it against its checksum; raises ContextError."""
    saved = read_header(path)
    _checked(saved)
    return saved


class ContextStore:
    """A folder of one or many models' contexts, of which the least recently used go when it grows over its limit.

    Args:
        folder: made with the first context that is added.
        model: whose contexts are found and added; its weights must not change meanwhile.
        max_bytes: of all files together.
    """

    def __init__(self, folder: str | Path, model: Model, max_bytes: int) -> None:
        self.folder, self.model, self.max_bytes = Path(folder), model, max_bytes
        self.fingerprint = model.fingerprint()
        self._most = model.max_positions
        self._known: set[str] | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    def up_to(self, num_tokens: int) -> ContextStore:
        """The same store, but that find() finds no context of more tokens."""
        other = copy.copy(self)
        other._most = num_tokens
        return other

    def ids(self) -> list[str]:
        """The ids of the model's contexts."""
        if not self.folder.is_dir():
            return []
        with locked(self.folder / ".lock", shared=True, wait=True):
            return [saved.id for saved in contexts_in(self.folder) if saved.fingerprint == self.fingerprint]

    def with_only(self, ids: Collection[str]) -> ContextStore:
        """The same store, but that find() finds only these contexts and those that it adds itself."""
        other = copy.copy(self)
        other._known = set(ids)
        return other

    def find(self, token: Sequence[int], *, like: Context | None = None) -> Context | None:
        """The longest saved context that `token` begins with, and counts it as used; None if there is none.

        Raises:
            ContextError: the file is damaged.
        """
        if not self.folder.is_dir():
            return None
        ids = np.asarray(token, np.int32)
        with locked(self.folder / ".lock", shared=True, wait=True):
            mine = [s for s in contexts_in(self.folder) if s.fingerprint == self.fingerprint]
            mine = [s for s in mine if self._known is None or s.id in self._known]
            for saved in sorted(mine, key=lambda saved: -saved.num_tokens):
                n = saved.num_tokens
                if n <= min(self._most, len(ids)) and saved.token_digest == _digest(ids[:n]):
                    with contextlib.suppress(PermissionError):  # another user's
                        os.utime(saved.path)
                    return load_context(saved.path, self.model, fingerprint=self.fingerprint, like=like)
        return None

    def add(self, context: Context, label: str = "") -> Path:
        """Save a context, unless it is there already, and drop what is over the limit, this one last.

        Raises:
            ContextError: the context alone is over the limit, or cannot be written.
        """
        size = sum(tensor.nbytes for tensor in _tensors(context).values())
        if size > self.max_bytes:
            raise ContextError(
                f"{self.folder}: a context of {size / 1e6:.0f} MB is over the limit of {self.max_bytes / 1e6:.0f} MB"
            )
        name = hashlib.sha256(f"{self.fingerprint} {_digest(context.token)}".encode()).hexdigest()[:24]
        path = self.folder / f"{name}.safetensors"
        with locked(self.folder / ".lock", wait=True):
            for stray in self.folder.glob("*.partial"):  # of a process that was killed: writers hold this lock
                stray.unlink()
            if not path.exists():
                save_context(path, self.model, context, label=label, fingerprint=self.fingerprint)
            saved = sorted(contexts_in(self.folder), key=lambda saved: (saved.path == path, saved.used))
            over = sum(s.num_bytes for s in saved) - self.max_bytes
            for old in saved[:-1]:
                if over <= 0:
                    break
                old.path.unlink()
                over -= old.num_bytes
        if self._known is not None:
            self._known.add(name)
        return path


def contexts_in(folder: Path) -> Iterator[SavedContext]:
    """The saved contexts of a folder that this user may read, by name; raises ContextError at a file that is none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            yield read_header(path)
        except PermissionError as error:
            _log.warning("%s: cannot be read: %s; passed over", path, error.strerror)


def remove(folder: Path, context_id: str) -> None:
    """Delete a context; those who have mapped it keep it.

    Raises:
        ContextError: there is none of this id.
    """
    with locked(folder / ".lock", wait=True):
        if context_id not in {path.stem for path in folder.glob("*.safetensors")}:
            raise ContextError(f"{folder}: no context {context_id!r}")
        (folder / f"{context_id}.safetensors").unlink()


def _tensors(context: Context) -> dict[str, torch.Tensor]:
    tensors = {"token": torch.from_numpy(context.token), "hidden": context.hidden}
    for layer, (keys, values) in context.cache.layers(len(context.token)).items():
        tensors |= {f"keys.{layer}": keys, f"values.{layer}": values}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _checked(saved: SavedContext) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped, after its checksum."""
    with _opened(saved.path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = {"format": FORMAT} | {name: getattr(saved, name) for name in _PROMISED}
    if _checksum(tensors, about) != saved.checksum:
        raise ContextError(f"{saved.path}: damaged: its checksum is another; remove it and save the context again")
    return tensors


def _digest(token: NDArray[np.int32]) -> str:
    return hashlib.sha256(token.astype("<i4").tobytes()).hexdigest()


def _checksum(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    path.open("rb").close()  # safetensors says of a file that may not be read that there is none
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ContextError(f"{path}: not a safetensors file, or cut short: {error}") from error
