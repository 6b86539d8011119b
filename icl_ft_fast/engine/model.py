"""Any causal language model that transformers loads, with its attention replaced by the trie's.

transformers supplies architecture, weights and tokenizer; attention goes through its AttentionInterface to
ops.trie_attention, and the head is called by ops.target_logprob for the rows that need it. Every load proves itself
on a small branching trie against plain forwards. Knows nothing of requests, questions or documents.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from icl_ft_fast import ops
from icl_ft_fast.engine import trie
from icl_ft_fast.engine.defaults import CHUNK_TOKENS as CHUNK_TOKENS
from icl_ft_fast.engine.defaults import DTYPE_NAMES, SHIPPED, SHIPPED_FOLDER, parse_bytes
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.memory import Footprint, Memory, live_bytes
from icl_ft_fast.runtime.errors import UserError

ATTENTION = "icl_ft_fast"
BLOCK_ROWS = 256  # rows in each forward of an invariant model, the last ones perhaps of zeros; fewer cost speed

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
    "stablelm": "an attention that does not pass the trie on",
    "nemotron": "an attention that does not pass the trie on",
    "gptj": "an attention of its own without transformers' interface",
}

READ = (".json", ".safetensors", ".model", ".txt", ".jinja")  # what transformers, tokenizers and peft open
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")  # of modules made before weights
MAX_MODULES = 4096


class ModelError(UserError):
    """A model that cannot be loaded or served; the message says why and what to do."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one forward stand, in cache coordinates: row i sees key j <=> j <= row_q[i] < end_k[j].

    Attributes:
        token: int64 [T].
        depth_q: int32 [T], positions in their sequences.
        row_q: int32 [T], positions in the cache.
        end_k: int32 [S].
        depth_k: int32 [S].
        cache: where earlier keys are; None when the T rows see only each other (training).
        slots: int64 [T] cache positions to write to; None appends after the cache's rows.
        batch_invariant: whether to fill them up to a block and attend along each row's path, see ops.trie_attention.
        plans: what the layers' attention shares, see ops.trie_attention.
    """

    token: torch.Tensor
    depth_q: torch.Tensor
    row_q: torch.Tensor
    end_k: torch.Tensor
    depth_k: torch.Tensor
    cache: KVCache | None = None
    slots: torch.Tensor | None = None
    batch_invariant: bool = False
    plans: dict[Any, Any] = field(default_factory=dict, init=False)


def _trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    icl_rows: Rows | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention contract: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, Dv].

    What fills a block behind the rows neither attends nor is seen.
    """
    if icl_rows is None:
        raise ModelError("its attention does not pass the trie on")
    if attention_mask is not None:  # transformers makes none for an attention without a mask of its own
        raise ModelError("its attention makes a mask of its own, which may hide what a trie shows")
    num_rows = icl_rows.row_q.shape[0]
    # Under autocast rotary embeddings leave q and k in float32.
    q, k, v = (t[0, :, :num_rows].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    if icl_rows.cache is not None:
        layer, rows = module.layer_idx, icl_rows.end_k.shape[0]
        if icl_rows.slots is None:
            k, v = icl_rows.cache.append(layer, k, v)  # type: ignore[arg-type]
        else:
            k, v = icl_rows.cache.write(layer, icl_rows.slots, k, v, rows)  # type: ignore[arg-type]
    tree = ops.TreeIndex(icl_rows.row_q, icl_rows.end_k, icl_rows.depth_q, icl_rows.depth_k)
    options = ops.AttentionOptions(scaling, sliding_window, softcap, s_aux, icl_rows.batch_invariant)
    out = ops.trie_attention(q, k, v, tree, options, plans=icl_rows.plans)
    return _filled(out, query.shape[2])[None], None


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The same with rows of zeros behind it, `rows` in all."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


@dataclass(frozen=True)
class Head:
    """The output head as ops.target_logprob takes it: logits = scale * (hidden @ weight.T + bias), soft-capped."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    batch_invariant: bool = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [R, V] after hidden [R, E]; for few rows, as decoding has them."""
        parts = [_filled(part, BLOCK_ROWS) for part in hidden.split(BLOCK_ROWS)] if self.batch_invariant else [hidden]
        products = [torch.nn.functional.linear(part, self.weight, self.bias) for part in parts]
        logits = torch.cat(products)[: len(hidden)].float() * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


@dataclass(frozen=True)
class Model:
    """A loaded network with its tokenizer.

    Attributes:
        network: the transformers model; its attention is the trie's.
        tokenizer: the transformers tokenizer.
        name: what load() was given.
        max_positions: the longest sequence the positions allow, in tokens.
        batch_invariant: whether a row's bits depend on its path alone, see load().
        memory: what scoring may take.
    """

    network: Any
    tokenizer: Any
    name: str
    max_positions: int
    batch_invariant: bool = False
    memory: Memory = field(default_factory=Memory)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.device
        return device

    @property
    def num_parameters(self) -> int:
        """Distinct weights (tied ones once)."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def vocabulary(self) -> int:
        """Token ids that the network knows."""
        return int(self.network.get_input_embeddings().num_embeddings)

    def fingerprint(self) -> str:
        """Hex digest of config, vocabulary and weights: models with other scores have another one.

        Reads every weight once, about a second a gigabyte.
        """
        config = {name: value for name, value in self.network.config.to_dict().items() if name[0] != "_"}
        described = [config, sorted(self.tokenizer.get_vocab().items()), self.tokenizer.special_tokens_map]
        if self.batch_invariant:  # its contexts have the bits of these alone
            described += [BLOCK_ROWS, torch.get_num_threads(), torch.__version__, torch.__config__.show()]
        described += [self.memory.kv_dtype] if self.memory.kv_dtype else []
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def body(self) -> Any:
        """The network without its head."""
        network = self.network
        return network.model if network.base_model is network else network.base_model

    @property
    def head(self) -> Head:
        """The output head with the config's scale and soft-cap."""
        linear, config = self.network.get_output_embeddings(), self.network.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        bias = getattr(linear, "bias", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, bias, float(scale), softcap, self.batch_invariant)

    @functools.cached_property
    def footprint(self) -> Footprint:
        """Bytes that weights and rows take, counted while a few rows are forwarded: exact for any architecture."""
        most = min(64, self.max_positions)
        cache, peaks = self.new_cache(most), []
        for rows in (most, most // 2, most):  # the first also makes the cache
            (chunk,) = trie.plan(trie.build_from_lists([([0] * rows, [0])]), rows).chunks
            with torch.inference_mode():
                peaks.append(live_bytes(functools.partial(self.forward_chunk, chunk, cache)))
            cache.rows = 0
        layers = cache.layers(most)
        # The copy of a layer that is read, and, of an int8 one, the float32 that it is made from.
        opened = max((k.nbytes + v.nbytes) * 4 // k.element_size() for k, v in layers.values())
        return Footprint(
            weight_bytes=sum(p.numel() * p.element_size() for p in self.network.parameters()),
            row_bytes=(peaks[2] - peaks[1]) // (most - most // 2),
            kv_row_bytes=cache.nbytes // most,
            layers=len(layers),
            open_row_bytes=0 if self.memory.kv_dtype is None else opened // most,
            block_bytes=peaks[2] if self.batch_invariant else 0,
        )

    def new_cache(self, capacity: int, folder: Path | None = None) -> KVCache:
        """An empty cache that keeps rows as `memory` says, in files in `folder` if there is one."""
        return KVCache(capacity, kv_dtype=self.memory.kept, folder=folder)

    def forward(self, rows: Rows) -> torch.Tensor:
        """Hidden states [T, E] of the rows, after the final norm; appends to rows.cache but does not commit."""
        if self.batch_invariant and rows.cache is not None:
            return torch.cat([self._forward(block) for block in _blocks(rows)])
        return self._forward(rows)

    def _forward(self, rows: Rows) -> torch.Tensor:
        num_rows = len(rows.token)
        size = BLOCK_ROWS if rows.batch_invariant else num_rows
        output = self.body(
            input_ids=_filled(rows.token, size)[None],
            position_ids=_filled(rows.depth_q, size)[None].long(),
            use_cache=False,
            icl_rows=rows,
        )
        hidden: torch.Tensor = output.last_hidden_state[0, :num_rows]
        return hidden

    def forward_chunk(self, chunk: trie.Chunk, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, E] of a planned chunk, whose ancestors are all that the cache holds; commits its rows."""
        device, kept = self.device, chunk.cached_rows
        end_k, depth_k = chunk.end_k.to(device), chunk.depth_k.to(device)
        row_q = torch.arange(kept, len(chunk.end_k), dtype=torch.int32, device=device)
        token = chunk.token.to(device, torch.int64)
        hidden = self.forward(Rows(token, depth_k[kept:], row_q, end_k, depth_k, cache))
        cache.commit(chunk.last_row - chunk.first_row)
        return hidden

    def forward_tree(self, tree: trie.Trie) -> torch.Tensor:
        """Hidden states [T, E] of a whole tree at once, differentiable; for training."""
        device = self.device
        end, depth = tree.end.to(device), tree.depth.to(device)
        row_q = torch.arange(len(end), dtype=torch.int32, device=device)
        return self.forward(Rows(tree.token.to(device, torch.int64), depth, row_q, end, depth))

    def target_logprob(
        self, hidden: torch.Tensor, row: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability float32 [M] of each target after its row of hidden [R, E], and whether it is the argmax."""
        head = self.head
        logp, is_argmax, _ = ops.target_logprob(
            hidden,
            head.weight,
            row.to(hidden.device),
            target.to(hidden.device),
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            batch_invariant=head.batch_invariant,
        )
        return logp, is_argmax


def _blocks(rows: Rows) -> Iterator[Rows]:
    """The same rows, so many at a time that every matrix product has the same shape: that decides how it is summed."""
    for first in range(0, len(rows.row_q), BLOCK_ROWS):
        part = slice(first, first + BLOCK_ROWS)
        row_q = rows.row_q[part]
        yield replace(
            rows,
            token=rows.token[part],
            depth_q=rows.depth_q[part],
            row_q=row_q,
            slots=row_q.long(),
            batch_invariant=True,
        )


DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str = "main",
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    self_check: bool = True,
    batch_invariant: bool = False,
    memory: int | str | None = None,
    kv_dtype: str | None = None,
    offload: str | Path | None = None,
) -> Model:
    """Load a causal language model from a local directory or the hub, safetensors weights only.

    Args:
        name: directory, hub id, or "shipped" for the small model that comes with the package.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's own if it is one of them.
        device: a torch device.
        revision: branch, tag or commit of a hub id.
        tokenizer: directory or hub id of another tokenizer than the checkpoint's own.
        adapter: directory or hub id of a PEFT adapter; it is merged into the weights, in their dtype.
        trust_remote_code: let the checkpoint's own Python code run; off unless you trust its author.
        self_check: compare a branching trie with plain forwards on the loaded weights; if batch_invariant, try every
            place of a block.
        batch_invariant: a request's score has the same bits whatever else is scored with it, in whatever order and
            chunks, and whether its beginning was prefilled or saved, on one machine with one number of threads; see
            docs/determinism.md. On the CPU only, and not for mixtures of experts.
        memory: what the process (a GPU: its allocations) may take when it scores, in bytes or like "4GB"; None for what
            it holds and most of what is free.
        kv_dtype: "bfloat16" or "int8" keeps keys and values so, which changes scores a little; None as they come.
        offload: folder for keys and values that do not fit the memory; None for the system's temporary one.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: no checkpoint, pickle weights, a family whose results would differ from its own forward, or a model
            that cannot be invariant.
    """
    import transformers

    if dtype not in (*DTYPES, "auto"):
        raise ModelError(f"dtype: one of {', '.join(DTYPES)} or auto, got {dtype!r}")
    try:
        limit = None if memory is None else parse_bytes(memory)
        limits = Memory(limit, kv_dtype, None if offload is None else Path(offload))
    except ValueError as error:
        raise ModelError(str(error)) from error
    given = str(name)
    if name == SHIPPED:
        name = SHIPPED_FOLDER
        if not name.is_dir():
            raise ModelError(
                f"{SHIPPED}: this edition comes without the shipped model's weights; train your own with "
                "`python -m icl_ft_fast.shipped.train --out DIR` and give DIR as the model"
            )
    _check_directory(Path(name))
    for place in (name, tokenizer, adapter):
        _check_files(Path(place or name))
    _register_attention()
    try:
        origin = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(name, **origin)
        for count in COUNTS:
            if (getattr(config.get_text_config(), count, None) or 0) > MAX_MODULES:
                raise ModelError(f"{name}: config.json: {count}: expected at most {MAX_MODULES:,}")
        _check_family(config)
        words = transformers.AutoTokenizer.from_pretrained(tokenizer or name, **origin)
        network, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
            **origin,
        )
        network = network.to(device)
    except ModelError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch each raise their own
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {_first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random values
        raise ModelError(f"{name}: the checkpoint lacks {len(missing)} of the network's tensors, {missing[0]} first")
    if network.dtype not in DTYPES.values():
        raise ModelError(f"{name}: its dtype {network.dtype} is not served; give dtype as one of {', '.join(DTYPES)}")
    if adapter is not None:
        network = _merged(network, adapter)
    for weight, values in network.named_parameters():
        if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all():
            raise ModelError(f"{name}: {weight}: has values that are not finite: nothing scored with it would be")
    return from_network(network, words, given, self_check=self_check, batch_invariant=batch_invariant, memory=limits)


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
        raise ModelError(f"adapter: {adapter}: reading it needs peft: pip install 'icl_ft_fast[lm-eval]'") from error
    weights = "adapter_model.safetensors"
    if Path(adapter).is_dir() and not (Path(adapter) / weights).is_file():
        raise ModelError(f"adapter: {adapter}: no {weights} here; pickle weights are refused")
    try:
        if not Path(adapter).is_dir():
            huggingface_hub.hf_hub_download(str(adapter), weights)  # fails where there are only pickle weights
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Found missing adapter keys")  # peft would leave them random
            return peft.PeftModel.from_pretrained(network, str(adapter)).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, huggingface_hub, safetensors and torch each raise their own
        raise ModelError(f"adapter: {adapter}: cannot be added to this network: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def from_network(
    network: Any,
    tokenizer: Any,
    name: str,
    *,
    self_check: bool = True,
    batch_invariant: bool = False,
    memory: Memory | None = None,
) -> Model:
    """Wrap a transformers network that is in memory already; its attention is replaced.

    Raises:
        ModelError: see load().
    """
    _register_attention()
    _check_family(network.config)
    network.set_attn_implementation(ATTENTION)
    network.eval()
    for module in network.modules():
        # llama4 scales a query by its place in the call, not by its position; below floor_scale the factor is 1.
        if getattr(module, "attn_temperature_tuning", False):
            module.attn_temperature_tuning = False
    model = Model(network, tokenizer, name, _max_positions(network.config), batch_invariant, memory or Memory())
    if batch_invariant:
        _check_can_be_invariant(model)
    if self_check:
        _self_check(model)
        if batch_invariant:
            _prove_invariant(model)
    return model


def _register_attention() -> None:
    """No mask goes with it: to make one, transformers would read the positions back from the device."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _trie_attention)


def _check_directory(path: Path) -> None:
    """Refuse, with the reason, a local directory that is no safetensors checkpoint."""
    if not path.is_dir():
        if path.exists() or str(path).startswith((".", "/", "~")):
            raise ModelError(f"{path}: not a directory with a checkpoint (config.json and *.safetensors)")
        return
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no checkpoint here: config.json is missing")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path / 'config.json'}: not valid JSON: {error}") from error
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
        if file.suffix in READ and not (file.is_file() and file.resolve().is_relative_to(root)):
            raise ModelError(f"{file}: no file of this directory: a link out of it, or no file at all; copy it here")
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
    return min(known) if known else 2**31 - 1


# A branching trie: one prefix, two branches, one of which splits again; chunks of 7 rows exercise the cache.
_CHECK_PATHS = ((0, 10), (10, 15)), ((0, 10), (15, 22), (22, 24)), ((0, 10), (15, 22), (24, 28))
_CHECK_SHARED = 10
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


@torch.inference_mode()
def _self_check(model: Model) -> None:
    """Raise unless a small trie's hidden states, and the head, give what one plain forward per path gives.

    In float32 every row must agree. bfloat16 rounds so much that a token can go to other experts, so there the median
    row beyond the shared prefix may be off by twice what the plain forward is from one of the same weights in float32.
    """
    network = model.network
    refusal = f"{model.name}: {network.config.model_type}: this family cannot be served"
    tokens = torch.randint(model.vocabulary, (28,), generator=torch.Generator().manual_seed(0)).tolist()
    paths = [[token for first, last in path for token in tokens[first:last]] for path in _CHECK_PATHS]
    tree = trie.build_from_lists([(path[:1], [*path[1:], 0]) for path in paths])
    plan = trie.plan(tree, 7)
    cache = KVCache(plan.capacity)
    try:
        parts = []
        for chunk in plan.chunks:
            cache.compact(chunk.keep)
            parts.append(model.forward_chunk(chunk, cache))
        hidden = torch.cat(parts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an attention that is not transformers' contract fails in its own way
        raise ModelError(f"{refusal}: {error}") from error
    exact = hidden.dtype == torch.float32
    errors, roundings = [], []
    network.set_attn_implementation("eager")
    try:
        for r, path in enumerate(paths):
            rows = tree.scored_row[tree.path[tree.path_offset[r] : tree.path_offset[r + 1]]].long()
            token = torch.tensor(path, device=model.device)
            plain = model.body(token[None], use_cache=False).last_hidden_state[0]
            errors.append(_distance(hidden[rows.to(plain.device)], plain))
            if not exact:
                with _in_float32(model.body):
                    unrounded = model.body(token[None], use_cache=False).last_hidden_state[0]
                roundings.append(_distance(plain, unrounded))
        logits = network(token[None], use_cache=False).logits[0]
    finally:
        network.set_attn_implementation(ATTENTION)
    if exact:
        worst, allowed = torch.cat(errors).max().item(), _CHECK_TOLERANCE[hidden.dtype]
    else:
        worst, allowed = (torch.cat([d[_CHECK_SHARED:] for d in x]).median().item() for x in (errors, roundings))
        allowed = 2 * allowed
    if not worst <= allowed:
        raise ModelError(
            f"{refusal}: on a small trie its hidden states differ from its own forward by {worst:.1e} of their size "
            f"({allowed:.1e} is rounding)"
        )
    rows = torch.arange(len(path) - 1)
    logp, _ = model.target_logprob(plain, rows, token[1:])
    own = logits[:-1].float().log_softmax(-1).gather(-1, token[1:, None])[:, 0]
    worst, scale = (logp - own).abs().max().item(), own.abs().max().item()
    if not worst <= _CHECK_TOLERANCE[hidden.dtype] * scale:
        raise ModelError(
            f"{refusal}: its output head's log-probabilities differ from its own by {worst:.1e} (scale {scale:.1e})"
        )


@contextlib.contextmanager
def _in_float32(body: torch.nn.Module) -> Iterator[None]:
    """Within the block weights and what is made of them are float32, the weights one layer's at a time."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(layer: torch.nn.Module, _: Any) -> None:
        for weight in layer.parameters():
            kept[weight], weight.data = weight.data, weight.data.float()

    def restore(*_: Any) -> None:
        while kept:
            weight, values = kept.popitem()
            weight.data = values

    hooks = []
    for layer in _layers(body):
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(restore)]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


def _layers(body: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of a body's lists of them, and what stands beside these lists."""
    for child in body.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif any(isinstance(module, torch.nn.ModuleList) for module in child.modules()):
            yield from _layers(child)
        else:
            yield child


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b| of each row, float32."""
    distance: torch.Tensor = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)
    return distance


def _check_can_be_invariant(model: Model) -> None:
    """Refuse what is known not to be: a GPU's kernels, and experts, whose products have as many rows as chose them."""
    if model.device.type != "cpu":
        raise ModelError(
            f"{model.name}: batch_invariant: not on {model.device}: a GPU's kernels sum in an order that depends on "
            "what is scored together; load it on the CPU, or without invariant"
        )
    for name, value in model.network.config.get_text_config().to_dict().items():
        if "experts" in name and value:
            raise ModelError(
                f"{model.name}: batch_invariant: not for a mixture of experts ({name} = {value}): how many rows an "
                "expert multiplies depends on what is scored together; load it without invariant"
            )


@torch.inference_mode()
def _prove_invariant(model: Model) -> None:
    """Raise unless a row has the same bits at every place of a block, and whatever stands at the others.

    A block is the same shapes each time; what is left is that kernels treat the ends of what they cut up differently.
    """
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(model.vocabulary, (BLOCK_ROWS,), generator=generator)
    row = torch.arange(BLOCK_ROWS, dtype=torch.int32)
    depth = torch.full_like(row, 7)

    def outputs(token: torch.Tensor) -> torch.Tensor:
        hidden = model.forward(Rows(token, depth, row, row + 1, depth, KVCache(BLOCK_ROWS)))
        return torch.cat([hidden.float(), model.head.logits(hidden)], 1)

    mixed, moved, alike = outputs(token), outputs(token.roll(1)), outputs(token[:1].expand(BLOCK_ROWS))
    if not torch.equal(moved.roll(-1, 0), mixed) or not torch.equal(alike, mixed[:1].expand_as(alike)):
        raise ModelError(
            f"{model.name}: batch_invariant: with {torch.get_num_threads()} threads of torch {torch.__version__} a "
            "row's bits depend on its place in a block or on its neighbours; try another number of threads "
            "(OMP_NUM_THREADS), or load it without invariant"
        )
