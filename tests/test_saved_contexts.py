"""Saved contexts: the same scores from a file, other models and damaged files refused, folders shared and limited."""

import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors import safe_open
from safetensors.torch import save_file

from icl_ft_fast.cli import main
from icl_ft_fast.engine import contexts
from icl_ft_fast.engine.contexts import ContextError, ContextStore, load_context, read_header, save_context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood, prefill, stored_context
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.score import score
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.task import Question

RNG = random.Random(0)
CONTEXT = [0, *RNG.choices(range(2, 300), k=40)]
REQUESTS = [([*CONTEXT, 5], [6, 7]), ([*CONTEXT, 5], [8]), (CONTEXT, [9, 10, 11])]


@pytest.fixture
def saved(llama, tmp_path):
    """A file and the context that it holds."""
    context, path = prefill(llama, CONTEXT), tmp_path / "one.safetensors"
    save_context(path, llama, context, label="a label")
    return path, context


def rewrite(path, change, **about):
    """Write the file anew with other tensors or another header; its checksum is made to fit."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["icl_ft_fast"])
    change(tensors)
    header = {name: value for name, value in (header | about).items() if name != "checksum"}
    header["checksum"] = contexts._checksum(tensors, header)
    save_file(tensors, path, metadata={"icl_ft_fast": json.dumps(header)})


def test_a_file_scores_bit_for_bit_as_what_was_saved(llama, saved):
    path, context = saved
    loaded, ledger = load_context(path, llama), Ledger()
    assert loglikelihood(llama, REQUESTS, start=loaded, ledger=ledger) == loglikelihood(llama, REQUESTS, start=context)
    assert ledger.cached_tokens == len(CONTEXT)
    assert ledger.forwarded_tokens == 1 + 1 + 2  # 5 once, 6, 9 and 10; the last token of a request is only predicted
    header = read_header(path)
    assert (header.label, header.model, header.num_tokens) == ("a label", llama.name, len(CONTEXT))


def test_it_is_mapped_and_the_run_leaves_the_file_alone(llama, saved):
    path, _ = saved
    before = path.read_bytes()
    loaded = load_context(path, llama)
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert any(str(path) in line for line in maps)
    loglikelihood(llama, REQUESTS, start=loaded)
    assert path.read_bytes() == before


def test_another_model_is_refused(llama, llama_directory, saved):
    path, _ = saved
    message = rf"^{path}: saved from '.*' with other weights, config, vocabulary or dtype than"
    with pytest.raises(ContextError, match=message):
        load_context(path, load(llama_directory, dtype="bfloat16"))
    weight = llama.network.model.norm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] += 1e-3
        with pytest.raises(ContextError, match=message):
            load_context(path, llama)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    load_context(path, llama)


def test_a_damaged_byte_and_a_cut_are_noticed(llama, saved):
    path, _ = saved
    whole = path.read_bytes()
    for place in {0, 7, 8, 30, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 60)}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ContextError, match=f"^{path}: "):
            load_context(path, llama)
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ContextError, match=f"^{path}: "):
            load_context(path, llama)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("keys.0"),
        lambda tensors: tensors.update({"keys.0": tensors["keys.0"][:, :1].contiguous()}),
        lambda tensors: tensors.update({"values.1": tensors["values.1"].double()}),
        lambda tensors: tensors.update({"keys.9": tensors["keys.0"].clone()}),
        lambda tensors: tensors.update({"hidden": tensors["hidden"][:-1].clone()}),
        lambda tensors: tensors.update({"token": tensors["token"][:-1].clone()}),
    ],
)
def test_tensors_that_are_not_the_model_s_are_refused(change, llama, saved):
    path, _ = saved
    rewrite(path, change)
    with pytest.raises(ContextError, match=f"^{path}: its tensors are not those of 41 tokens of"):
        load_context(path, llama, like=prefill(llama, CONTEXT[:1]))


def test_tokens_other_than_promised_are_refused(llama, saved):
    path, _ = saved
    rewrite(path, lambda tensors: tensors["token"].add_(1))
    with pytest.raises(ContextError, match="its tokens are not those that its header names"):
        load_context(path, llama)


@pytest.mark.parametrize("about", [{"format": "icl_ft_fast context 2"}, {"num_tokens": "41"}, {"extra": 1}])
def test_another_form_is_refused(about, llama, saved):
    path, _ = saved
    rewrite(path, lambda tensors: None, **about)
    with pytest.raises(ContextError, match=f"^{path}: not a saved context of the form"):
        read_header(path)


def test_any_other_file_is_refused(tmp_path, llama):
    path = tmp_path / "x.safetensors"
    for text in (b"", b"{}", b"\x80\x04K\x01.", b"\xff" * 64):
        path.write_bytes(text)
        with pytest.raises(ContextError, match=f"^{path}: not a safetensors file, or cut short"):
            read_header(path)
    save_file({"token": torch.zeros(1)}, path)
    with pytest.raises(ContextError, match=f"^{path}: not a saved context$"):
        read_header(path)


def test_a_store_finds_the_longest_beginning(llama, llama_directory, tmp_path):
    store = ContextStore(tmp_path, llama, 10**9)
    assert store.find(CONTEXT) is None
    for length in (10, 20, 30):
        store.add(prefill(llama, CONTEXT[:length]))
    assert len(store.find(CONTEXT).token) == 30
    assert len(store.find(CONTEXT[:29]).token) == 20
    assert store.find(CONTEXT[:9]) is None
    assert store.find([1, *CONTEXT]) is None
    assert ContextStore(tmp_path, load(llama_directory, dtype="bfloat16"), 10**9).find(CONTEXT) is None
    ledger = Ledger()
    stored_context(llama, CONTEXT, store, ledger=ledger)
    assert (ledger.forwarded_tokens, ledger.cached_tokens) == (len(CONTEXT) - 30, 30)


def test_a_run_counts_each_row_once(llama, tmp_path):
    """Forwarded, or reused; a second run from the same context reuses all of it."""
    store = ContextStore(tmp_path, llama, 10**9)
    for reused in (0, len(CONTEXT)):  # made and saved, then mapped
        ledger, again = Ledger(), Ledger()
        start = stored_context(llama, CONTEXT, store, ledger=ledger)
        loglikelihood(llama, REQUESTS, start=start, ledger=ledger, count_start=False)
        rows = len(CONTEXT) + 4
        assert (ledger.forwarded_tokens, ledger.cached_tokens) == (rows - reused, reused)
        loglikelihood(llama, REQUESTS, start=start, ledger=again)
        assert (again.forwarded_tokens, again.cached_tokens) == (4, len(CONTEXT))


def test_the_least_recently_used_goes_first(llama, tmp_path):
    pieces = [prefill(llama, [n, *CONTEXT[1:]]) for n in (1, 2, 3, 4)]
    store = ContextStore(tmp_path, llama, 10**9)
    paths = [store.add(piece) for piece in pieces[:3]]
    for age, path in enumerate(paths):
        os.utime(path, (time.time() - 100 + age,) * 2)
    store.find(pieces[0].token)  # used just now
    size = paths[0].stat().st_size
    last = ContextStore(tmp_path, llama, int(2.5 * size)).add(pieces[3])
    assert {path for path in [*paths, last] if path.exists()} == {paths[0], last}
    with pytest.raises(ContextError, match=rf"^{tmp_path}: a context of \d+ MB is over the limit of 0 MB"):
        ContextStore(tmp_path, llama, 1000).add(pieces[1])
    assert last.exists()


def write(model, folder, limit):
    """Prefill contexts into a folder and look for them there."""
    store = ContextStore(folder, model, limit)
    for n in range(2, 14):
        store.add(prefill(model, [n, *range(2, 40)]))
        for m in range(2, 14):
            found = store.find([m, *range(2, 40)])
            assert found is None or found.token[0] == m


def test_processes_share_a_folder(llama, tmp_path):
    one = tmp_path / "one.safetensors"
    save_context(one, llama, prefill(llama, [2, *range(2, 40)]))
    limit = 5 * one.stat().st_size
    store = tmp_path / "store"
    codes, told = forked(*[partial(write, llama, store, limit)] * 2)
    assert codes == [0, 0], told
    found = list(contexts.contexts_in(store))
    assert 1 <= len(found) <= 5
    assert [contexts.verify(saved.path) for saved in found] == found
    assert not list(store.glob("*.partial"))


def test_what_a_killed_writer_left_is_swept(llama, tmp_path):
    stray = tmp_path / "abc.partial"
    stray.write_bytes(b"half")
    store = ContextStore(tmp_path, llama, 10**9)
    assert store.find(CONTEXT) is None
    store.add(prefill(llama, CONTEXT))
    assert not stray.exists()


def test_questions_over_a_saved_context(llama, tmp_path):
    text = "the cat sat on the mat. who knows why? " * 5
    questions = [Question("a", " the cat", (" sat", " is")), Question("b", "who knows", (" why", " that it is"))]
    expected = score(llama, questions, context=text)
    for forwarded_context in (True, False):
        store, ledger = ContextStore(tmp_path, llama, 10**9), Ledger()
        got = score(llama, questions, context=text, store=store, ledger=ledger)
        for one, other in zip(got, expected, strict=True):
            assert one.logp == pytest.approx(other.logp, rel=0, abs=1e-5)
        assert (ledger.forwarded_tokens > 40) == forwarded_context
        assert "context" in ledger.seconds


def test_the_commands(llama_directory, tmp_path, capsys):
    documents, questions, store = tmp_path / "d.jsonl", tmp_path / "q.jsonl", tmp_path / "store"
    write_jsonl(documents, [{"id": str(n), "text": "the cat sat on the mat."} for n in range(4)])
    write_jsonl(questions, [{"id": "a", "prompt": "the cat", "choices": [" sat", " is"]}])
    model = ["--model", str(llama_directory)]
    assert (
        main(["context", "save", *model, "--documents", str(documents), "--store", str(store), "--label", "four cats"])
        == 0
    )
    assert f"in {store}" in capsys.readouterr().out
    outputs = []
    for n, more in enumerate((["--store", str(store)], [])):
        out = tmp_path / f"{n}.jsonl"
        files = ["--documents", str(documents), "--questions", str(questions), "--out", str(out)]
        assert main(["score", "--quiet", *model, *files, *more]) == 0
        assert (f"read from {store}" in capsys.readouterr().out) == bool(more)
        outputs.append(json.loads(out.read_text()))
    assert outputs[0]["logp"] == pytest.approx(outputs[1]["logp"], rel=0, abs=1e-5)
    assert main(["context", "list", "--store", str(store)]) == 0
    listed = capsys.readouterr().out
    assert "four cats" in listed
    assert "1 contexts" in listed
    assert main(["context", "verify", "--store", str(store)]) == 0
    (path,) = store.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["context", "verify", "--store", str(store)]) == 2
    assert capsys.readouterr().err == (
        f"icl-ft-fast context: {path}: damaged: its checksum is another; remove it and save the context again\n"
    )
    assert main(["context", "remove", "--store", str(store), "nothing"]) == 2
    assert "begins 0 of the ids" in capsys.readouterr().err
    assert main(["context", "remove", "--store", str(store), path.stem[:8]]) == 0
    assert not path.exists()
    assert main(["context", "list", "--store", str(tmp_path / "none")]) == 2


def test_a_store_is_shared_by_users(llama, tmp_path, monkeypatch, caplog):
    """What another user may not read is passed over, and what is his is not touched."""
    store = ContextStore(tmp_path, llama, 10**9)
    context = prefill(llama, CONTEXT)
    path = store.add(context, "one")
    assert path.stat().st_mode & 0o044
    open_, utime = Path.open, os.utime

    def refused(what):
        def call(first, *arguments, **options):
            if Path(first) == path:
                raise PermissionError(13, "Permission denied", str(first))
            return what(first, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refused(utime))
        assert len(store.find(CONTEXT).token) == len(CONTEXT)
        patch.setattr(Path, "open", refused(open_))
        assert store.find(CONTEXT) is None
        assert f"{path}: cannot be read: Permission denied; passed over" in caplog.text
        assert store.add(context, "one") == path
