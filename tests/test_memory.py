"""Budgets, plans that fit them, what is kept of keys and values, offloaded caches, chunks that memory ran out on."""

import errno
import gc
import json
import logging
import math
import os
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import FAMILIES

import icl_ft_fast
from benchmarks import memory as measured
from icl_ft_fast import ops
from icl_ft_fast.cli import main
from icl_ft_fast.engine import memory as budget
from icl_ft_fast.engine import trie
from icl_ft_fast.engine.defaults import parse_bytes
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.forward import footprint_of
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.kv_cache import KVCache, pack, unpack
from icl_ft_fast.engine.likelihood import ScoreError, loglikelihood, prefill
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.memory import BudgetError, Footprint, Memory, group_free_bytes
from icl_ft_fast.engine.model import ModelError
from icl_ft_fast.tasks.task import Question

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PART = st.lists(st.sampled_from([0, 5, 299]), min_size=1, max_size=6)
REQUESTS = st.lists(st.tuples(PART, PART), min_size=1, max_size=10)


def fit(tree, chunk_tokens, memory, footprint, device, *, known=0, cut=0, **options):
    """The plan of a tree that fits, and what it takes."""
    extent = partial(trie.extent, tree, known=known, cut=cut)
    size, need = budget.fit(extent, chunk_tokens, memory, footprint, device, **options)
    return trie.plan(tree, size, known=known, cut=cut), need


def asked(number=30):
    """Requests over a context of 60 tokens, some of which share a question."""
    rng = random.Random(0)

    def draw(most):
        return [rng.randrange(2, 300) for _ in range(rng.randint(1, most))]

    context = draw(1) * 20 + [t for _ in range(20) for t in draw(3)]
    questions = [context + draw(9) for _ in range(number // 3)]
    return [(question, draw(6)) for question in questions for _ in range(3)]


ASKED = asked()


def assert_near(got, expected, within=1e-4):
    assert [one.logp for one in got] == pytest.approx([one.logp for one in expected], rel=0, abs=within)
    assert [one.is_greedy for one in got] == [one.is_greedy for one in expected]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5", 5),
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("2 kB", 2000),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "4 parsecs", "4iB", "4GBB", "nan", "1e9", 0, -3])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=r"^memory: expected"):
        parse_bytes(text)


def test_limits_that_cannot_be_followed_are_named(llama_directory):
    for options, message in [({"memory": "lots"}, "memory: expected"), ({"kv_dtype": "int4"}, "kv_dtype: expected")]:
        with pytest.raises(ModelError, match=message):
            load(llama_directory, **options)


def test_control_groups_bound_what_is_free(tmp_path):
    membership = tmp_path / "cgroup"
    assert group_free_bytes(membership, tmp_path) == math.inf

    def group(path, kind, limit, usage, cache):
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("max", "current", "") if kind == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]}inactive_file {cache}\nactive_file 9\n")

    membership.write_text("0::/outer/inner\n")
    group("outer/inner", 2, "max", 50, 0)
    assert group_free_bytes(membership, tmp_path) == math.inf
    group("outer", 2, 1000, 300, 200)
    assert group_free_bytes(membership, tmp_path) == 900
    group("outer/inner", 2, 100, 150, 20)
    assert group_free_bytes(membership, tmp_path) == 0
    membership.write_text("5:cpu:/x\n4:memory:/not/mounted/here\n1:name=systemd:/x\n")
    group("memory", 1, 5000, 4000, 1)
    assert group_free_bytes(membership, tmp_path) == 1001


def test_what_is_free_is_plausible():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < budget.free_bytes(CPU) <= total
    assert 50e6 < budget.held_bytes(CPU) < total


def profiled_bytes(call):
    """The most that torch's allocator holds during a call, by its own events.

    Garbage is left alone meanwhile: what an earlier profiled call made and the collector frees in this one counts less
    than nothing.
    """
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        gc.enable()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "lfm2", "opt"])
def test_a_rows_bytes_are_those_that_the_allocator_counts(family, tiny_network):
    options = FAMILIES.get(family, {}) | ({"num_key_value_heads": 4} if family in ("gpt2", "opt") else {})
    model = from_network(tiny_network(family, **options), None, family, self_check=False)
    peaks, cache = [], model.new_cache(120)
    for rows in (120, 60, 120):
        (chunk,) = trie.plan(trie.build_from_lists([([0] * rows, [0])]), rows).chunks
        with torch.inference_mode():
            peaks.append(profiled_bytes(lambda c=chunk: model.forward_chunk(c, cache)))
        cache.rows = 0
    assert footprint_of(model).row_bytes == pytest.approx((peaks[2] - peaks[1]) / 60, rel=0.02)
    assert footprint_of(model).kv_row_bytes == work_of(model).kv_row_bytes
    assert footprint_of(model).weight_bytes == work_of(model).weight_bytes


def test_rows_that_are_kept_in_less_take_less(llama):
    heads, size, layers = 2, 8, 2
    for kv_dtype, element, scale in (("bfloat16", 2, 0), ("int8", 1, 4)):
        footprint = footprint_of(replace(llama, memory=Memory(kv_dtype=kv_dtype)))
        assert footprint.kv_row_bytes == layers * 2 * heads * (size * element + scale)
        assert footprint.open_row_bytes == 2 * heads * size * 4
    assert footprint_of(llama).open_row_bytes == 0


FOOTPRINT = Footprint(weight_bytes=10**6, row_bytes=70_000, kv_row_bytes=30_000, layers=3, open_row_bytes=0)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, chunk_tokens=st.integers(1, 50), share=st.floats(0, 1.2), extra=st.integers(0, 10**6))
@example([([0], [5])], 1, 0.0, 0)
def test_the_plan_is_the_largest_that_fits(requests, chunk_tokens, share, extra):
    tree, held = trie.build_from_lists(requests), 5 * 10**8

    def total(size, offloaded):
        plan = trie.plan(tree, size)
        rows = max(len(chunk.token) for chunk in plan.chunks)
        assert trie.extent(tree, size) == (rows, plan.capacity)
        kv = plan.capacity * FOOTPRINT.kv_row_bytes // (FOOTPRINT.layers if offloaded else 1)
        index = plan.capacity * budget.INDEX_BYTES
        return held + kv + index + rows * FOOTPRINT.row_bytes + extra + budget.OTHER_BYTES

    halves = [chunk_tokens]
    while halves[-1] > 1:
        halves.append(halves[-1] // 2)
    ways = [(size, False) for size in halves if size >= min(32, chunk_tokens)] + [(size, True) for size in halves]
    least = total(1, True)
    limit = int(least + share * (total(chunk_tokens, False) - least))
    fitting = [way for way in ways if total(*way) <= limit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "held_bytes", lambda _: held)
        plan, need = fit(tree, chunk_tokens, Memory(limit), FOOTPRINT, CPU, extra_bytes=extra)
        size, offloaded = fitting[0]
        assert [c.first_row for c in plan.chunks] == [c.first_row for c in trie.plan(tree, size).chunks]
        assert bool(need.offloaded_bytes) == offloaded
        assert need.total_bytes == total(size, offloaded) <= limit
        with pytest.raises(BudgetError, match=r"^memory: too little: .*, --kv-dtype int8") as caught:
            fit(tree, chunk_tokens, Memory(least - 1), FOOTPRINT, CPU, extra_bytes=extra)
        (advised,) = re.findall(r"give --memory \(memory=\) (\w+) or more", str(caught.value))
        fit(tree, chunk_tokens, Memory(parse_bytes(advised)), FOOTPRINT, CPU, extra_bytes=extra)


def test_a_stack_that_a_context_has_room_on_is_not_counted_again(monkeypatch):
    tree = trie.build_from_lists(ASKED)
    monkeypatch.setattr(budget, "held_bytes", lambda _: 0)
    _, need = fit(tree, 16, Memory(10**10), FOOTPRINT, CPU)
    for room, expected in [(need.capacity - 1, need.kv_bytes), (need.capacity, 0)]:
        assert fit(tree, 16, Memory(10**10), FOOTPRINT, CPU, room=room)[1].kv_bytes == expected


def test_a_gpu_s_plan_counts_its_workspace_and_what_the_ops_allocate(llama, monkeypatch):
    tree, asked = trie.build_from_lists(ASKED), []
    monkeypatch.setattr(budget, "held_bytes", lambda _: 0)
    _, cpu = fit(tree, 16, Memory(10**10), FOOTPRINT, CPU)
    _, gpu = fit(
        tree,
        16,
        Memory(10**10),
        FOOTPRINT,
        torch.device("cuda"),
        temporary_bytes=lambda rows, capacity: asked.append((rows, capacity)) or 1000,
    )
    assert asked == [(gpu.rows, gpu.capacity)]
    assert gpu.other_bytes - cpu.other_bytes == budget.GPU_OTHER_BYTES - budget.OTHER_BYTES + 1000
    config, told = llama.network.config, []
    monkeypatch.setattr(ops, "temporary_bytes", lambda *_, **shapes: told.append(shapes) or 0)
    loglikelihood(llama, ASKED, chunk_tokens=16)
    generate(llama, ["the cat"], Sampling(2))
    heads = (config.num_attention_heads, config.num_key_value_heads)
    assert [shapes["heads"] for shapes in told] == [heads] * 2
    assert told[0]["num_queries"] == 16 < told[0]["num_keys"]
    assert {shapes["sizes"] for shapes in told} == {(config.head_dim, config.head_dim)}


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    tree = trie.build_from_lists(ASKED)
    monkeypatch.setattr(budget, "held_bytes", lambda _: 0)
    _, need = fit(tree, 16, Memory(10**10), FOOTPRINT, CPU)
    limits = Memory(need.total_bytes - 1, offload=tmp_path)
    assert fit(tree, 16, limits, FOOTPRINT, CPU)[1].offloaded_bytes == need.kv_bytes
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda _: SimpleNamespace(free=need.kv_bytes - 1))
    with pytest.raises(BudgetError, match=rf"{tmp_path} has 0\.00 GB free: name another folder with --offload"):
        fit(tree, 16, limits, FOOTPRINT, CPU)


def spilling(model, folder, requests, chunk_tokens, monkeypatch):
    """The model with a limit under which these requests have to spill."""
    monkeypatch.setattr(budget, "held_bytes", lambda _: 0)
    tree = trie.build_from_lists(requests)
    _, need = fit(tree, chunk_tokens, Memory(10**12), footprint_of(model), CPU)
    return replace(model, memory=Memory(need.total_bytes - 1 + extra_of(tree), model.memory.kv_dtype, Path(folder)))


def extra_of(tree):
    return 16 * len(tree.scored_token) + 160 * len(tree.path_offset)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_spilled_stack_changes_no_bit_and_leaves_nothing_behind(llama, tmp_path, monkeypatch, caplog, kv_dtype):
    kept = replace(llama, memory=Memory(kv_dtype=kv_dtype))
    expected = loglikelihood(kept, ASKED, chunk_tokens=16)
    offloaded = spilling(kept, tmp_path, ASKED, 16, monkeypatch)
    folders, forward = [], type(llama).forward

    def spy(model, rows):
        hidden = forward(model, rows)
        maps = Path("/proc/self/maps").read_text()
        folders.append((rows.cache.folder, list(tmp_path.iterdir()), maps.count(str(tmp_path))))
        return hidden

    assert footprint_of(offloaded) == footprint_of(kept)  # taken now, on a cache in memory
    monkeypatch.setattr(type(llama), "forward", spy)
    with caplog.at_level(logging.WARNING):
        assert loglikelihood(offloaded, ASKED, chunk_tokens=16) == expected
    assert folders == [(tmp_path, [], 2)] * len(folders)  # a mapping a layer, and no file that has a name
    assert f"offloaded to {tmp_path}" in caplog.text
    start = prefill(offloaded, ASKED[0][0][:40], chunk_tokens=16)
    assert_near(
        loglikelihood(offloaded, ASKED, chunk_tokens=16, start=start), expected, 1e-4 if kv_dtype is None else 0.05
    )


def test_a_full_disk_is_an_error_before_anything_is_written(llama, tmp_path, monkeypatch):
    offloaded = spilling(llama, tmp_path, ASKED, 16, monkeypatch)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"bytes of offloaded keys and values: No space left on device: '{tmp_path}'"):
        loglikelihood(offloaded, ASKED, chunk_tokens=16)


def naive_int8(rows):
    made = torch.empty_like(rows)
    for t in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            largest = max(abs(x) for x in rows[t, g].tolist())
            for d, x in enumerate(rows[t, g].tolist()):
                made[t, g, d] = round(x * 127 / largest) * largest / 127 if largest else 0
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_multiples_of_a_127th_of_each_rows_largest(dtype):
    rows = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 5)[:, None, None]
    rows[3, 1] = 0
    rows = rows.to(dtype)
    kept = pack(rows, torch.int8)
    assert [part.dtype for part in kept] == [torch.int8, torch.float32]
    got, exact = unpack(kept, torch.float32), naive_int8(rows.double())
    off = (got.double() - exact).abs() > 1e-6 * rows.double().abs().amax(-1, keepdim=True)
    assert off.sum() <= 2  # a component midway between two multiples goes either way
    assert ((got - rows.float()).abs() <= rows.float().abs().amax(-1, keepdim=True) * (1 / 254 + 1e-6)).all()
    assert torch.isnan(unpack(pack(torch.full((1, 1, 2), math.nan), torch.int8), torch.float32)).all()


@pytest.mark.parametrize(("kv_dtype", "share"), [(torch.bfloat16, 2**-8), (torch.int8, 1 / 254)])
def test_attention_over_kept_rows_is_within_the_documented_bound(kv_dtype, share):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 16, generator=generator) for n, heads in ((40, 4), (40, 2), (40, 2)))
    row, end = torch.arange(40, dtype=torch.int32), torch.full((40,), 40, dtype=torch.int32)
    tree = ops.TreeIndex(row, end, row, row)
    exact = ops.trie_attention(q.double(), k.double(), v.double(), tree)
    kept_k, kept_v = (unpack(pack(x, kv_dtype), x.dtype) for x in (k, v))
    got = ops.trie_attention(q, kept_k, kept_v, tree)
    largest_k, largest_v = k.abs().amax().item(), v.abs().amax().item()
    delta = 16**-0.5 * q.abs().sum(-1).amax().item() * share * largest_k
    bound = math.expm1(2 * delta) * largest_v + share * largest_v
    error = (got.double() - exact).abs().max().item()
    assert 1e-4 < error <= bound


@pytest.mark.parametrize(("kv_dtype", "within"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_scores_from_kept_rows_are_near_and_do_not_depend_on_chunks(llama, kv_dtype, within):
    kept = replace(llama, memory=Memory(kv_dtype=kv_dtype))
    expected = [result.logp for result in loglikelihood(llama, ASKED)]
    got = [result.logp for result in loglikelihood(kept, ASKED)]
    chunked = [result.logp for result in loglikelihood(kept, ASKED, chunk_tokens=7)]
    errors = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    assert 1e-5 < max(errors) < within
    # Rounding of the last bit can move a component to the next value that can be kept.
    assert sum(abs(a - b) > 1e-4 for a, b in zip(got, chunked, strict=True)) <= len(got) // 3
    assert chunked == pytest.approx(expected, rel=0, abs=within)
    assert kept.fingerprint() != llama.fingerprint() == replace(llama, memory=Memory(10**9)).fingerprint()


def test_a_stack_moves_to_another_of_any_kind(tmp_path):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, 2, size, generator=generator) for size in (8, 5))
    kinds = [(None, None), (torch.int8, None), (torch.bfloat16, tmp_path), (torch.int8, tmp_path)]
    for one, folder in kinds:
        for other, other_folder in kinds:
            cache = KVCache(9, kv_dtype=one, folder=folder)
            cache.append(0, k, v)
            cache.append(3, v, k)
            cache.commit(6)
            cache.compact(torch.tensor([0, 1, 4, 5]))
            moved = cache.copy(3, KVCache(4, kv_dtype=other, folder=other_folder))
            where = torch.tensor([0, 1, 4])
            for layer, (mine, mine_v) in {0: (k, v), 3: (v, k)}.items():
                for rows, expected in zip(moved.layers(3)[layer], (mine[where], mine_v[where]), strict=True):
                    kept = unpack(pack(expected, one), torch.float32)
                    torch.testing.assert_close(
                        rows, unpack(pack(kept, other), torch.float32), rtol=1e-6, atol=1e-7
                    )  # int8 of int8 rounds the scale again
                    if one == other:
                        assert torch.equal(rows, kept)


def test_the_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.int8)
    assert budget.is_exhausted(caught.value)
    assert not budget.is_exhausted(RuntimeError("The size of tensor a must match"))


def out_of_memory(rows):
    sizes = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12"
    return [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("bad_alloc"), RuntimeError(sizes)][rows % 3]


def test_chunks_that_memory_runs_out_on_are_halved(llama, monkeypatch, caplog):
    at_once = loglikelihood(llama, ASKED, chunk_tokens=4)
    expected = loglikelihood(llama, ASKED, chunk_tokens=16)
    attention, failed = ops.trie_attention, []

    def failing(q, *rest, **options):
        if len(q) > 4 and (len(failed) or len(rest[0]) > 40) and rest[0].shape[0] > 20:
            failed.append(len(q))
            raise out_of_memory(len(failed))
        return attention(q, *rest, **options)

    monkeypatch.setattr(ops, "trie_attention", failing)
    with caplog.at_level(logging.WARNING):
        got = loglikelihood(llama, ASKED, chunk_tokens=16)
    assert failed == [16, 8]  # once a size, in the midst of the run
    assert_near(got, expected, 1e-5)
    assert [record.args[:2] for record in caplog.records if "ran out" in record.msg] == [(16, 8), (8, 4)]

    def always(q, *rest, **options):
        if len(q) > 4:
            raise out_of_memory(0)
        return attention(q, *rest, **options)

    monkeypatch.setattr(ops, "trie_attention", always)
    assert loglikelihood(llama, ASKED, chunk_tokens=16) == at_once  # the very chunks
    start = prefill(llama, ASKED[0][0][:40], chunk_tokens=16)
    assert_near(loglikelihood(llama, ASKED, chunk_tokens=16, start=start), expected, 1e-4)


def test_a_second_layer_that_runs_out_leaves_no_trace_of_the_first(llama, monkeypatch):
    expected = loglikelihood(llama, ASKED, chunk_tokens=8)
    write, calls = KVCache.write, []

    def failing(cache, layer, where, k, v, rows):
        calls.append((layer, len(k)))
        if layer == 1 and len(k) > 8:
            raise MemoryError
        return write(cache, layer, where, k, v, rows)

    monkeypatch.setattr(KVCache, "write", failing)
    assert loglikelihood(llama, ASKED, chunk_tokens=16) == expected
    assert calls[:4] == [(0, 16), (1, 16), (0, 8), (1, 8)]


def test_a_head_that_memory_runs_out_on_is_given_less(llama, monkeypatch):
    expected = loglikelihood(llama, ASKED, chunk_tokens=64)
    op = ops.target_logprob

    def failing(hidden, *rest, **options):
        if len(hidden) > 5:
            raise torch.OutOfMemoryError
        return op(hidden, *rest, **options)

    monkeypatch.setattr(ops, "target_logprob", failing)
    assert_near(loglikelihood(llama, ASKED, chunk_tokens=64), expected)
    start = prefill(llama, ASKED[0][0][:40])
    inside = [(ASKED[0][0][:1], ASKED[0][0][1:40]), *ASKED]  # 39 head rows in the context itself
    got = loglikelihood(llama, inside, chunk_tokens=64, start=start)
    assert_near(got[1:], expected)


def test_what_cannot_be_halved_or_is_no_want_of_memory_is_raised(llama, monkeypatch):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(ops, "trie_attention", failing)
    for error in (torch.OutOfMemoryError("no room"), RuntimeError("a bug")):
        with pytest.raises(type(error), match=str(error)):
            loglikelihood(llama, ASKED, chunk_tokens=4)


def test_a_stack_that_was_lost_while_it_was_compacted_is_not_used(llama, monkeypatch):
    compact, work_on = KVCache.compact, KVCache._work_on

    def compacting(cache, keep, moved=None):
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "_work_on", failing)
            compact(cache, keep)

    def failing(cache, layer):
        if layer == 1:
            raise MemoryError("compacting")
        work_on(cache, layer)

    monkeypatch.setattr(KVCache, "compact", compacting)
    with pytest.raises(MemoryError, match="compacting"):
        loglikelihood(llama, ASKED, chunk_tokens=16)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, max_rows=st.integers(2, 30), data=st.data())
def test_a_halved_plan_finds_the_stack_it_needs(requests, max_rows, data):
    tree = trie.build_from_lists(requests)
    plan = trie.plan(tree, max_rows)
    k = data.draw(st.integers(0, len(plan.chunks) - 1))
    cache = []
    for chunk in plan.chunks[: k + 1]:
        cache = [cache[p] for p in chunk.keep.tolist()]
        if chunk is not plan.chunks[k]:
            cache += range(chunk.first_row, chunk.last_row)
    halved = plan.halved(k)
    assert halved.capacity == plan.capacity
    assert [c.last_row for c in halved.chunks[:-1]] == [c.first_row for c in halved.chunks[1:]]
    assert (halved.chunks[0].first_row, halved.chunks[-1].last_row) == (plan.chunks[k].first_row, len(tree.token))
    for chunk in halved.chunks:
        assert 2 * len(chunk.token) <= len(plan.chunks[k].token) + 1
        cache = [cache[p] for p in chunk.keep.tolist()]
        path, row = [], int(tree.parent[chunk.first_row])
        while row >= 0:
            path.append(row)
            row = int(tree.parent[row])
        assert cache == path[::-1]
        cache += range(chunk.first_row, chunk.last_row)
        assert len(cache) <= plan.capacity
    targets = sorted(i for chunk in (*plan.chunks[:k], *halved.chunks) for i in chunk.target_index.tolist())
    assert targets == list(range(len(tree.scored_row)))


def test_a_forest_that_does_not_fit_is_refused_with_what_to_change(llama, llama_directory, tmp_path, capsys):
    small = replace(llama, memory=Memory(10**6))
    with pytest.raises(ScoreError, match=r"^memory: too little: \d\.\d\d GB of 0\.00 GB: .* held by the process"):
        loglikelihood(small, ASKED)
    with pytest.raises(ScoreError, match=r"^memory: too little"):
        prefill(small, [5, 6])
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "q", "prompt": "the cat", "choices": [" sat", " on"], "answer": 0}) + "\n")
    command = ["score", "--model", str(llama_directory), "--questions", str(questions), "--quiet", "--json"]
    for options, code, shown in [
        (["--memory", "1MB"], 2, "give --memory (memory=)"),
        (["--memory", "64GB", "--kv-dtype", "int8", "--offload", str(tmp_path)], 0, '"questions": 1'),
    ]:
        assert main([*command, *options, "--out", str(tmp_path / "out.jsonl")]) == code
        assert shown in "".join(capsys.readouterr())
    with pytest.raises(SystemExit):
        main([*command, "--memory", "much", "--out", str(tmp_path / "x.jsonl")])
    assert "expected a number of bytes above 0 or a size like 4GB" in capsys.readouterr().err


def test_the_documented_python_runs(llama_directory):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {"iff": icl_ft_fast, "questions": [Question("q", " who", (" knows", " sat"))], "text": "the cat sat on"}
    exec(code.replace('"shipped"', repr(str(llama_directory))), names)
    assert [score.question_id for score in names["scores"]] == ["q"]


def test_peak_memory_is_the_plans_and_spilling_changes_no_bit():
    plain, offloaded = (measured.measure(case) for case in measured.cases(quick=True)[:2])
    for got in (plain, offloaded):
        assert got["peak_bytes"] <= measured.WITHIN * got["planned_bytes"]
        assert got["planned_bytes"] - budget.OTHER_BYTES <= measured.WITHIN * got["peak_bytes"]
    assert offloaded["planned_bytes"] < plain["planned_bytes"]
    assert offloaded["offloaded_bytes"] == plain["kv_bytes"]
    assert offloaded["logp"] == plain["logp"]
