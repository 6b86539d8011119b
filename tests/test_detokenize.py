"""Tokens' texts joined are the text, for tokenizers of bytes and of marked spaces, wherever a text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_ft_fast.engine.detokenize import Detokenizer, pieces

TEXT = ["the quick brown fox jumps over the lazy dog", "Grüße, 你好 мир 🙂 the the fox", "0 1 2  3\n\n4"] * 10


@pytest.fixture(scope="module")
def metaspace():
    """As Llama 2 has it: a mark for each space, one put before a text and taken off when decoded."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    learnt = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, limit_alphabet=40, show_progress=False)
    learnt.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXT], trainer)
    learnt.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    learnt.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=learnt, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_space_before_a_word_is_kept_behind_a_prompt(metaspace):
    ids = metaspace("the quick fox", add_special_tokens=False)["input_ids"]
    assert metaspace.decode(ids[2:])[:1] != " "  # what is lost when the rest is decoded alone
    for cut in range(1, len(ids)):
        before = metaspace.decode(ids[:cut])
        assert before + "".join(pieces(metaspace, ids[cut:], ids[:cut])) == "the quick fox"


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.sampled_from("the quick 你好🙂é\n."), max_size=30), cut=st.integers(0, 60))
@pytest.mark.parametrize("kind", ["bytes", "bytes without BOS", "metaspace"])
def test_pieces_join_to_the_text(kind, text, cut, metaspace, tokenizer, tokenizer_without_bos):
    chosen = {"bytes": tokenizer, "bytes without BOS": tokenizer_without_bos, "metaspace": metaspace}[kind]
    ids = chosen(text, add_special_tokens=False)["input_ids"]
    whole, cut = chosen.decode(ids), min(cut, len(ids))
    joined = "".join(pieces(chosen, ids))
    assert joined == whole
    known = Detokenizer(chosen)
    before = "".join(map(known.push, ids[:cut]))
    assert before + "".join(pieces(chosen, ids[cut:], ids[:cut])) == whole


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=20))
def test_bytes_that_are_no_text(ids, tokenizer):
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
