"""A GGUF file as a folder of safetensors, read once into a cache; every later load takes the folder.

transformers maps names, tensors, config and tokenizer; the header that it reads is the one that gguf.py checked. Knows
nothing of how a folder is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from icl_ft_fast.engine.gguf import TYPES, GgufError, GgufHeader, GgufTensor, read_header
from icl_ft_fast.runtime.durable import follow_umask, locked, sync

CACHE_VARIABLE = "ICL_FT_FAST_CACHE"
ORIGIN = "gguf"  # the field of config.json that says what the weights were read from
VERSION = 1  # of what is written; a folder of another one is read anew
PROBES = ("Hello  world, it's 12,345.\n\tdef f(x): return 'Zürich' ", " a", "<s>[INST]\u2581\u4e2d\u6587 \U0001f600")

_log = logging.getLogger(__name__)
_replaced = threading.Lock()  # gguf.GGUFReader is one for all threads


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder that GGUF files are read into: the one given, $ICL_FT_FAST_CACHE, or icl_ft_fast in the user's."""
    if given or os.environ.get(CACHE_VARIABLE):
        return Path(given or os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icl_ft_fast"


def folder_of(file: Path, cache: str | Path | None = None, check: Callable[[Any], None] = lambda _: None) -> Path:
    """The folder in the cache that a GGUF file was read into, by its SHA-256; it is read now if it was not.

    Args:
        file: the GGUF file.
        cache: see cache_folder().
        check: called with the config before any weight is read; raises where it cannot be served.

    Raises:
        GgufError: a file that cannot be read, or too little space.
        OSError: the file cannot be read, or the cache not written.
    """
    import transformers

    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_folder(cache) / "gguf" / f"{sha256}-{VERSION}-{transformers.__version__}"
    if not folder.is_dir():
        header = read_header(file)
        with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not folder.is_dir():  # another process may have read it meanwhile
                size_mb = 4 * header.num_values / 1e6
                _log.warning("%s: read once into %s: %.0f MB, which later loads take", file, folder, size_mb)
                convert(file, folder, header=header, check=check)
    return folder


def convert(
    file: Path,
    folder: Path,
    *,
    header: GgufHeader | None = None,
    check: Callable[[Any], None] = lambda _: None,
) -> GgufHeader:
    """Write the checkpoint in a GGUF file to a new folder: float32 safetensors, config and tokenizer.

    Args:
        file: the GGUF file.
        folder: to be made; complete or absent, whatever happens. One writer at a time: hold a lock.
        header: of the file, if it was read already.
        check: see folder_of().

    Returns:
        The header.

    Raises:
        GgufError: a file that cannot be read, an architecture that transformers does not map whole, too little space,
            or a folder that exists.
        OSError: a file cannot be read or written.
    """
    header = header or read_header(file)
    if folder.exists():
        raise GgufError(f"{folder}: exists already; choose a folder that does not")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        needed, free = 4 * header.num_values, shutil.disk_usage(partial).free
        if needed > free:
            raise GgufError(
                f"{file}: takes {needed / 1e6:,.0f} MB in {folder.parent}, where {free / 1e6:,.0f} are free"
            )
        _write(file, header, partial, check)
        for written in (*partial.rglob("*"), partial):
            if written.is_file():
                follow_umask(written)
            sync(written)
        os.rename(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return header


def _write(file: Path, header: GgufHeader, folder: Path, check: Callable[[Any], None]) -> None:
    """Write network and tokenizer, as transformers reads them from the file, into a folder."""
    import torch
    import transformers
    from transformers.utils import logging as their_logging

    verbosity, auto = their_logging.get_verbosity(), transformers.AutoModelForCausalLM
    had_bars = their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()  # it warns that weights are dequantised, which is what is asked for
    their_logging.disable_progress_bar()
    try:
        with _as_checked(file, header) as given:
            config = transformers.AutoConfig.from_pretrained(given["name"], gguf_file=given["file"])
            check(config)
            _check_whole(file, header, config)
            words = transformers.AutoTokenizer.from_pretrained(given["name"], gguf_file=given["file"])
            network, loading = auto.from_pretrained(
                given["name"],
                gguf_file=given["file"],
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
            )
        if missing := sorted(loading["missing_keys"]):
            raise GgufError(f"{file}: lacks {len(missing)} of the network's tensors, {missing[0]} first")
        network.hf_quantizer = None  # the weights are plain ones: transformers would refuse to save others
        del network.config.quantization_config
        setattr(network.config, ORIGIN, {"quantization": header.quantization})
        network.save_pretrained(folder)
        words.save_pretrained(folder)
        _check_words(file, words, transformers.AutoTokenizer.from_pretrained(folder))
    except GgufError:
        raise
    except OSError as error:
        if error.errno is not None:  # transformers raises OSError for files that it cannot make sense of, too
            raise
        raise GgufError(f"{file}: {_first_line(error)}") from error
    except ImportError as error:
        raise GgufError(f"{file}: reading GGUF needs gguf and accelerate: pip install 'icl_ft_fast[gguf]'") from error
    except Exception as error:  # transformers, tokenizers, gguf and torch each raise their own
        raise GgufError(f"{file}: cannot be read as a causal language model: {_first_line(error)}") from error
    finally:
        their_logging.set_verbosity(verbosity)
        if had_bars:
            their_logging.enable_progress_bar()


def _check_whole(file: Path, header: GgufHeader, config: Any) -> None:
    """Refuse a file whose tensors are not those of the network that transformers makes of its config.

    transformers drops tensors that it does not know, such as Llama 3's rope_freqs, and goes on without. The network
    stands on no memory here: a config may ask for more than there is.
    """
    import torch
    import transformers

    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    expected = sum(weights.numel() for weights in network.parameters())
    if expected != header.num_values:
        rope = next((f", {tensor.name} among them" for tensor in header.tensors if "rope" in tensor.name), "")
        raise GgufError(
            f"{file}: holds {header.num_values:,} weights{rope}, but transformers' {config.model_type} has a place for "
            f"{expected:,}: its scores would be another model's; give the checkpoint that the file was made from"
        )


def _check_words(file: Path, expected: Any, found: Any) -> None:
    """Refuse a tokenizer that came out another one when it was written and read."""
    same = all(expected(text)["input_ids"] == found(text)["input_ids"] for text in PROBES)
    if not same or expected.chat_template != found.chat_template or expected.eos_token_id != found.eos_token_id:
        raise GgufError(
            f"{file}: its tokenizer cannot be kept by transformers; convert the original checkpoint instead"
        )


class _Field(NamedTuple):
    """A field as transformers takes it of gguf.GGUFReader: parts[i] for i in data, each of the types."""

    parts: list[Any]
    data: range
    types: list[int]


class _Tensor(NamedTuple):
    """A tensor as transformers takes it of gguf.GGUFReader."""

    name: str
    tensor_type: Any
    shape: tuple[int, ...]
    data: Any


class _CheckedReader:
    """What transformers takes of gguf.GGUFReader, made of a header that was checked, in a twentieth of the time."""

    def __init__(self, file: Path, header: GgufHeader) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType

        content = np.asarray(np.memmap(file, mode="r", dtype=np.uint8))  # a memmap passes its class on, slowly

        def blocks(tensor: GgufTensor) -> Any:
            _, size, num_bytes = TYPES[tensor.type]
            row = tensor.shape[-1] // size * num_bytes
            return content[tensor.start : tensor.start + tensor.num_bytes].reshape(*tensor.shape[:-1], row)

        self.fields = {}
        for name, field in header.fields.items():
            strings = [isinstance(value, bytes) for value in field.values]
            parts = [value if is_string else (value,) for value, is_string in zip(field.values, strings, strict=True)]
            self.fields[name] = _Field(parts, range(len(parts)), list(field.types))
        self.tensors = [_Tensor(t.name, GGMLQuantizationType(t.type), t.shape[::-1], blocks(t)) for t in header.tensors]


@contextmanager
def _as_checked(file: Path, header: GgufHeader) -> Iterator[dict[str, str]]:
    """Within the block transformers finds the file, alone in a folder, and reads the header that was checked.

    Beside the file there may be a tokenizer_config.json, which transformers would follow. gguf's map of tensor names is
    made once: transformers asks for it anew for every module.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as bars

    with tempfile.TemporaryDirectory() as folder, _replaced:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        theirs = gguf.GGUFReader, gguf.get_tensor_name_map, bars.tqdm
        gguf.GGUFReader, bars.tqdm = lambda *_: _CheckedReader(file, header), _bare
        gguf.get_tensor_name_map = lru_cache(theirs[1])
        try:
            yield {"name": folder, "file": "model.gguf"}
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map, bars.tqdm = theirs


def _bare(items: Any, **_: Any) -> Any:
    """The items, without tqdm's bar."""
    return items


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
