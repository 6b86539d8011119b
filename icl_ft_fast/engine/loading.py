"""Loading: a checkpoint from a directory or the hub as a Model, or the reason why it is refused.

Safetensors only; every load proves itself by selfcheck.py. Knows nothing of requests, questions or documents.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from icl_ft_fast.engine import control_tokens, conversion, selfcheck
from icl_ft_fast.engine.defaults import DTYPE_NAMES, SHIPPED, SHIPPED_FOLDER, parse_bytes
from icl_ft_fast.engine.gguf import GgufError
from icl_ft_fast.engine.memory import Memory
from icl_ft_fast.engine.model import ATTENTION, Model, ModelError, register_attention, register_linear

NO_INTERFACE = "its attention does not use transformers' attention interface"
# Families whose mathematics the interval rule does not express; the self-check finds others.
UNSERVED = {
    "bloom": "ALiBi position biases",
    "mpt": "ALiBi position biases",
    "mamba": "recurrent state",
    "mamba2": "recurrent state",
    "falcon_mamba": "recurrent state",
    "bamba": "recurrent state",
    "falcon_h1": "recurrent state",
    "qwen3_next": "recurrent state",
    "jamba": "recurrent state",
    "rwkv": "recurrent state",
    "recurrent_gemma": "recurrent state",
    "stablelm": "its attention drops the keyword `icl_rows`, so prefix-shared scores would be wrong",
    "nemotron": "its attention drops the keyword `icl_rows`, so prefix-shared scores would be wrong",
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"),
        "its attention sees only the tokens that an index of its own picks",
    ),
    "gptj": NO_INTERFACE,
}

READ = (".json", ".safetensors", ".model", ".txt", ".jinja")  # what transformers, tokenizers and peft open
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")  # of modules made before weights
MAX_MODULES = 4096
MOST_ADAPTERS = 8  # one trained on the other
LFS_POINTER = b"version https://git-lfs"


_log = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    revision: str = "main",
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    cache: str | Path | None = None,
    trust_remote_code: bool = False,
    self_check: bool = True,
    batch_invariant: bool = False,
    memory: int | str | None = None,
    kv_dtype: str | None = None,
    offload: str | Path | None = None,
    special_tokens: str = "text",
) -> Model:
    """Load a causal language model from a local directory, a GGUF file or the hub; never from pickle weights.

    Args:
        name: directory, GGUF file, hub id, or "shipped" for the small model that comes with the package. A directory
            with a PEFT adapter alone loads the model that it names as its base.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's own if it is one of them. None: float32 on a CPU;
            on a GPU, where float32 is many times slower, the checkpoint's own, or bfloat16 if that is neither.
        device: a torch device.
        revision: branch, tag or commit of a hub id.
        tokenizer: directory or hub id of another tokenizer than the checkpoint's own.
        adapter: directory or hub id of a PEFT adapter; it is merged into the weights, in their dtype.
        cache: folder that GGUF files are read into, once each; None for $ICL_FT_FAST_CACHE or icl_ft_fast in the
            user's cache folder.
        trust_remote_code: let the checkpoint's own Python code run; off unless you trust its author.
        self_check: compare a branching trie with plain forwards on the loaded weights; if batch_invariant, try every
            place of a block.
        batch_invariant: a request's score has the same bits whatever else is scored with it, in whatever order and
            chunks, and whether its prefix was prefilled or saved, on one machine with one number of threads; see
            docs/determinism.md. On the CPU only, and not for mixtures of experts.
        memory: limit of the process while it scores (on a GPU, of its allocations), in bytes or like "4GB"; None for
            what it holds and most of what is free.
        kv_dtype: "bfloat16" or "int8" keeps keys and values so, which changes scores a little; None as they come.
        offload: folder for keys and values that do not fit the memory; None for the system's temporary one.
        special_tokens: "text" reads control tokens that are spelt in documents, questions and choices as text; "keep"
            reads them as the tokens. Prompts of loglikelihood() and generate() are read as they are either way.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: no checkpoint, pickle weights, a damaged GGUF file, a family whose results would differ from its own
            forward, or a model that cannot be invariant.

    Examples:
        >>> model = iff.load("shipped")
        >>> model.max_positions
        4096
    """
    if dtype not in (*DTYPES, "auto", None):
        raise ModelError(f"dtype: one of {', '.join(DTYPES)} or auto, got {dtype!r}")
    if special_tokens not in control_tokens.MODES:
        raise ModelError(f"special_tokens: one of {', '.join(control_tokens.MODES)}, got {special_tokens!r}")
    try:
        limit = None if memory is None else parse_bytes(memory)
        limits = Memory(limit, kv_dtype, None if offload is None else Path(offload))
    except ValueError as error:
        raise ModelError(str(error)) from error
    name, tokenizer, adapter = _at_home(name), tokenizer and _at_home(tokenizer), adapter and _at_home(adapter)
    given = str(name)
    name, adapters = _base_of(name)
    adapters += [] if adapter is None else [adapter]
    if name == SHIPPED:
        name = SHIPPED_FOLDER
        if not name.is_dir():
            raise ModelError(
                f"{SHIPPED}: this version comes without the shipped model's weights; train your own with "
                "`python -m icl_ft_fast.shipped.train --out DIR` and give DIR as the model"
            )
    elif Path(name).is_file():
        try:
            name = conversion.folder_of(Path(name), cache, _check_family)
        except GgufError as error:
            raise ModelError(str(error)) from error
    for place in (name, tokenizer or name, *adapters):
        _check_files(Path(place))
    _check_directory(Path(name))
    register_attention()
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    network, words = _read(name, tokenizer or name, dtype, device, origin)
    control_tokens.set_mode(words, special_tokens)
    for one in adapters:
        network = _merged(network, one)
    for weight, values in network.named_parameters():
        if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all():
            raise ModelError(f"{name}: {weight}: has values that are not finite: nothing scored with it would be")
    return from_network(
        network,
        words,
        given,
        self_check=self_check,
        batch_invariant=batch_invariant,
        memory=limits,
        adapter=str(adapter or ""),
    )


def _at_home(place: str | Path) -> str | Path:
    """The place, with the home folder where it begins with ~."""
    return Path(place).expanduser() if str(place).startswith("~") else place


def _read(
    name: str | Path, tokenizer: str | Path, dtype: str | None, device: str, origin: dict[str, Any]
) -> tuple[Any, Any]:
    """A checkpoint's network and tokenizer, as transformers reads them; raises ModelError."""
    import transformers

    try:
        wanted = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
        config = transformers.AutoConfig.from_pretrained(name, **origin)
        for count in COUNTS:
            if (getattr(config.get_text_config(), count, None) or 0) > MAX_MODULES:
                raise ModelError(f"{name}: config.json: {count}: expected at most {MAX_MODULES:,}")
        _check_family(config)
        if quantised := getattr(config, "quantization_config", None):
            method = dict(quantised).get("quant_method") if isinstance(quantised, dict) else None
            raise ModelError(
                f"{name}: quantised weights ({method or 'quantization_config in config.json'}) are not served; give "
                "the checkpoint that they were made from"
            )
        words = transformers.AutoTokenizer.from_pretrained(tokenizer, **origin)
        network, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES.get(wanted, wanted),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **origin,
        )
        network = network.to(device)
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch each raise their own
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            raise ModelError(f"{name}: {config.model_type}: this family cannot be served: {NO_INTERFACE}") from error
        broken = _unreadable(Path(name)) or _unreadable(Path(tokenizer))
        raise ModelError(
            broken or f"{name}: cannot be loaded as a causal language model: {_in_a_line(error)}"
        ) from error
    _check_template(tokenizer, words)
    if other := sorted(loading["mismatched_keys"]):
        tensor, here, wanted_shape = other[0]
        raise ModelError(
            f"{name}: {tensor}: the file has the shape {list(here)}, and config.json asks for {list(wanted_shape)}"
            + (f" ({len(other)} tensors differ so)" if len(other) > 1 else "")
        )
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random values
        raise ModelError(f"{name}: the checkpoint lacks {len(missing)} of the network's tensors, {missing[0]} first")
    if dtype is None and wanted == "auto":
        network = _in_served_dtype(network, name, device)
    if network.dtype not in DTYPES.values():
        raise ModelError(f"{name}: its dtype {network.dtype} is not served; give dtype as one of {', '.join(DTYPES)}")
    known = network.get_input_embeddings().num_embeddings
    if over := sorted((i, piece) for piece, i in words.get_vocab().items() if i >= known):
        _log.warning(
            "%s: the tokenizer has %d tokens that the network lacks (%d to %d, %r first): texts with one of them "
            "cannot be scored",
            name,
            len(over),
            over[0][0],
            over[-1][0],
            over[0][1],
        )
    return network, words


def _in_served_dtype(network: Any, name: str | Path, device: str) -> Any:
    """The network in the checkpoint's own dtype if it is served, else in bfloat16; says which, in a line."""
    own = str(network.dtype).removeprefix("torch.")
    if own in DTYPES:
        said = "the checkpoint's own dtype"
    else:
        said, network = f"instead of the checkpoint's {own}", network.to(torch.bfloat16)
    served = str(network.dtype).removeprefix("torch.")
    others = " or ".join(sorted(set(DTYPES) - {served}))
    _log.warning("%s: on %s in %s, %s; dtype= (--dtype) %s for another", name, device, served, said, others)
    return network


def load_same(name: str, loading: dict[str, Any], fingerprint: str) -> Model:
    """load(name, **loading), as another process did it that found this fingerprint; raises ModelError if it differs."""
    model = load(name, **loading)
    if model.fingerprint() != fingerprint:
        raise ModelError(f"{name}: another model here than where the command was started")
    return model


def _merged(network: Any, adapter: str | Path) -> Any:
    """The network with a PEFT adapter added to its weights."""
    import huggingface_hub

    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelError(f"adapter: {adapter}: reading it needs peft: pip install 'icl_ft_fast[lora]'") from error
    weights = "adapter_model.safetensors"
    if Path(adapter).is_dir() and not (Path(adapter) / weights).is_file():
        raise ModelError(f"adapter: {adapter}: no {weights} here; pickle weights are refused")
    try:
        if not Path(adapter).is_dir():
            huggingface_hub.hf_hub_download(str(adapter), weights)  # fails where there are only pickle weights
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's
            warnings.filterwarnings("error", message=".*Found missing adapter keys")  # peft would leave them random
            adapted = peft.PeftModel.from_pretrained(network, str(adapter)).eval()
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = adapted.peft_config["default"].peft_type.value
                raise ModelError(f"adapter: {adapter}: {kind} puts tokens before the text, which no weights can do")
            expected = selfcheck.plain_logits(adapted, network)
            merged = adapted.merge_and_unload(safe_merge=True)
            found = selfcheck.plain_logits(merged, merged)
        off, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        if not off <= selfcheck.TOLERANCE[network.dtype] * scale:
            why = "in the output head or the embeddings of a model that ties them, it changes both"
            if network.dtype != torch.float32 and not network.config.get_text_config().tie_word_embeddings:
                why = f"the sum is rounded to {network.dtype}; load it with dtype float32"
            raise ModelError(
                f"adapter: {adapter}: cannot be merged into the weights: it would move logits by {off:.1e} of "
                f"{scale:.1e}; {why}"
            )
        return merged.requires_grad_(True)  # peft leaves the weights frozen
    except ModelError:
        raise
    except Exception as error:  # peft, huggingface_hub, safetensors and torch each raise their own
        broken = _unreadable(Path(adapter))
        raise ModelError(
            f"adapter: {broken or f'{adapter}: cannot be added to this network: {_in_a_line(error)}'}"
        ) from error


def _in_a_line(error: Exception) -> str:
    """What an error says, on one line; of errors that say a value only, their kind too."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if not said or isinstance(error, LookupError) else said


def _unreadable(folder: Path) -> str | None:
    """The first file of a local folder that is damaged, and how; the libraries that read them name none."""
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        try:
            if file.suffix == ".json":
                _json_object(file)
            elif file.suffix in (".jinja", ".txt"):
                file.read_text(encoding="utf-8")
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except ModelError as error:
            return str(error)
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file}: damaged, or not such a file: {_in_a_line(error)}"
    return None


def _json_object(file: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint holds; raises ModelError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _check_template(tokenizer: str | Path, words: Any) -> None:
    """Take the byte-order mark off a chat template, which would begin every prompt; refuse one that is no text."""
    template = getattr(words, "chat_template", None)
    if isinstance(template, str):
        words.chat_template = template.lstrip("\ufeff")
    elif template is not None and not isinstance(template, dict):
        raise ModelError(f"{tokenizer}: chat_template: expected a text, got {type(template).__name__}")


def from_network(
    network: Any,
    tokenizer: Any,
    name: str,
    *,
    self_check: bool = True,
    batch_invariant: bool = False,
    memory: Memory | None = None,
    adapter: str = "",
) -> Model:
    """Wrap a transformers network that is in memory already; its attention is replaced.

    Raises:
        ModelError: see load().
    """
    register_attention()
    _check_family(network.config)
    network.set_attn_implementation(ATTENTION)
    network.eval()
    register_linear(network)
    for module in network.modules():
        # llama4 scales a query by its place in the call, not by its position; below floor_scale the factor is 1.
        if getattr(module, "attn_temperature_tuning", False):
            module.attn_temperature_tuning = False
    if (positions := _max_positions(network.config)) < 1:
        raise ModelError(f"{name}: config.json: max_position_embeddings: expected at least 1, got {positions}")
    ends = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and (not isinstance(token, int) or token < 0):
            raise ModelError(f"{name}: generation_config.json: eos_token_id: expected token ids, got {ends!r}")
    model = Model(network, tokenizer, name, positions, batch_invariant, memory or Memory(), adapter)
    if batch_invariant:
        selfcheck.check_can_be_invariant(model)
    if self_check:
        selfcheck.check(model)
        if batch_invariant:
            selfcheck.prove_invariant(model)
    return model


def _base_of(name: str | Path) -> tuple[str | Path, list[str | Path]]:
    """A model's place, and the adapters to merge into it: those of local directories that hold an adapter alone."""
    adapters: list[str | Path] = []
    while (described := Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        try:
            base = json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{described}: not an adapter's configuration with base_model_name_or_path") from error
        if not isinstance(base, str) or not base or len(adapters) == MOST_ADAPTERS:
            raise ModelError(f"{described}: base_model_name_or_path: give the model, and this folder as the adapter")
        adapters.insert(0, name)
        name = base
    return name, adapters


def _check_directory(path: Path) -> None:
    """Refuse, with the reason, a local directory that is no safetensors checkpoint."""
    if not path.is_dir():
        if str(path).startswith((".", "/", "~")) or path.suffix == ".gguf":
            raise ModelError(f"{path}: no such directory or GGUF file")
        return
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f"; give the GGUF file itself: {found[0]}" if found else ""
        raise ModelError(f"{path}: no checkpoint here: config.json is missing{hint}")
    for settings in (path / "config.json", path / "generation_config.json"):
        if settings.is_file():  # transformers passes over a second one that it cannot read, and so over how texts end
            _json_object(settings)
    if not list(path.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"{path}: {pickles[0]}: pickle weights can run code when they are read and are refused; "
                "convert the checkpoint to safetensors (save_pretrained writes it)"
            )
        raise ModelError(f"{path}: no checkpoint here: no *.safetensors file")


def _check_files(path: Path) -> None:
    """Refuse a local directory whose reading would lead out of it, or to something else than safetensors."""
    if not path.is_dir():
        return
    # In the hub's cache the files of snapshots/REVISION are links to the blobs beside it.
    root = (path.parents[1] if path.parent.name == "snapshots" else path).resolve()
    for file in path.rglob("*"):
        if file.suffix not in READ:
            continue
        if not (file.is_file() and file.resolve().is_relative_to(root)):
            raise ModelError(f"{file}: no file of this directory: a link out of it, or no file at all; copy it here")
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{file}: a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    for index in path.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: not an index of shards: {error}") from error
        if others := shards - {file.name for file in path.glob("*.safetensors")}:
            raise ModelError(f"{index}: {others.pop()!r}: expected the name of a .safetensors file of this directory")


def _check_family(config: Any) -> None:
    if config.model_type in UNSERVED:
        raise ModelError(f"{config.model_type}: this family cannot be served: {UNSERVED[config.model_type]}")


def _max_positions(config: Any) -> int:
    """The longest sequence, from the config, that a forward of its own would compute as the trie does.

    llama4's attention chunks are not expressed beyond their first, nor is its scaling of queries from floor_scale on.
    longrope gives every position other frequencies once the sequence is longer than the original length, so prefixes
    could not be shared across it.
    """
    config = config.get_text_config()
    limits = [getattr(config, field, None) for field in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(getattr(config, "attention_chunk_size", None))
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(int(config.floor_scale) - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(of_layer_type for of_layer_type in rope.values() if isinstance(of_layer_type, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    return min([*known, 2**31 - 1])
