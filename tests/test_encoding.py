"""The boundary between context and continuation against the rule of lm-evaluation-harness, written out again here."""

import copy
import random

import pytest
from conftest import sentences
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_ft_fast.engine import encoding
from icl_ft_fast.shipped.tokenizer import build_tokenizer

WORDS = ["the", " cat", " sat", "who kn", "ows", "—", "ü", "猫", "🙂", "x"]
PIECES = [*WORDS, " ", "  ", "\n", "\t", "\u00a0", "<s>", "</s>", "<", "s>"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=8)


@pytest.fixture(scope="session", params=["tokenizer", "tokenizer_without_bos"])
def either(request):
    return request.getfixturevalue(request.param)


def harness_rule(tokenizer, context, continuation):
    """TemplateLM.loglikelihood and HFLM.tok_encode of lm-evaluation-harness 0.4.13, for a causal model."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def ids(text, bare=False):
        bare = bare or text.startswith(tokenizer.decode(prefix))
        return tokenizer.encode(text, **({"add_special_tokens": False} if bare else {}))

    if not context:
        alone = ids(continuation, bare=True)
        return (alone[:1], alone[1:]) if alone[0] == prefix else ([prefix], alone)
    kept = context.rstrip()
    whole, context_ids = ids(context + continuation), ids(kept)
    return context_ids, whole[len(context_ids) :]


@settings(max_examples=300, deadline=None)
@given(context=TEXT, continuation=TEXT.filter(bool))
@example(context="the cat ", continuation="sat")
@example(context="the cat", continuation=" sat")
@example(context="", continuation="the cat")
@example(context="", continuation="<s>the cat")
@example(context="", continuation="</s>the cat")
@example(context="<s>the", continuation=" cat")
@example(context="<", continuation="s>the cat")
@example(context="who kn", continuation="ows")
@example(context="the cat \u00a0\n", continuation=" sat")
@example(context="the\ufdd4", continuation="\ufdd4 cat")  # what control tokens are marked with, alone
def test_a_pair_is_cut_where_the_harness_cuts_it(either, context, continuation):
    context_ids, continuation_ids = encoding.encode_pairs(either, [(context, continuation)])[0]
    expected = harness_rule(either, context, continuation)
    if not expected[0]:  # nothing but spaces, and no BOS: the harness gives up; here it is an empty context
        expected = harness_rule(either, "", context + continuation)
    assert (context_ids, continuation_ids) == expected


def test_pairs_encoded_together_come_out_as_each_alone(either):
    texts = sentences(20)
    pairs = [(a, b) for a in ["", " ", *texts[:5]] for b in texts]
    together = encoding.encode_pairs(either, pairs)
    assert together == [encoding.encode_pairs(either, [pair])[0] for pair in pairs]
    assert encoding.encode_pairs(either, []) == []


def test_a_token_that_spans_the_join_is_no_token_of_the_continuation(tokenizer):
    bos, who, knows = tokenizer.encode("who knows")  # " knows" is one token, so nothing of it is left for "ows"
    cut = [("who kn", "ows"), ("who", " knows"), ("who ", "knows")]
    assert [continuation for _, continuation in encoding.encode_pairs(tokenizer, cut)] == [[], [knows], [knows]]
    assert encoding.encode_pairs(tokenizer, cut)[1:] == [([bos, who], [knows])] * 2


def test_a_token_that_runs_on_over_the_join_shortens_the_continuation(tokenizer_without_bos):
    tokenizer = tokenizer_without_bos  # its tokens hold spaces and more than one word
    whole, context = tokenizer.encode("the cat sat on"), tokenizer.encode("the cat")
    assert whole[: len(context)] != context
    assert encoding.encode_pairs(tokenizer, [("the cat", " sat on")]) == [(context, whole[len(context) :])]


def test_bos_comes_first_and_once(tokenizer):
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    bos = tokenizer.bos_token_id
    assert encoding.opening(tokenizer) == [bos]
    assert encoding.encode(tokenizer, ["the cat", "<s>the cat", "", "<s>", "the<s>"]) == [
        [bos, *plain],
        [bos, *plain],
        [bos],
        [bos],
        [bos, *tokenizer.encode("the", add_special_tokens=False), bos],
    ]
    assert encoding.encode_pairs(tokenizer, [("", "<s>the cat")]) == [([bos], plain)]


def test_a_tokenizer_without_bos_gets_none_but_for_an_empty_context(tokenizer_without_bos):
    tokenizer, eos = tokenizer_without_bos, tokenizer_without_bos.eos_token_id
    plain = tokenizer.encode("why it is")
    assert encoding.opening(tokenizer) == []
    assert encoding.encode(tokenizer, ["why it is", ""]) == [plain, []]
    assert encoding.encode_pairs(tokenizer, [("", "why it is"), ("", "</s>why it is")]) == [([eos], plain)] * 2


def test_a_tokenizer_that_has_bos_but_does_not_add_it_gets_it_for_an_empty_context_only(tokenizer):
    silent = copy.deepcopy(tokenizer)
    silent.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    plain = silent.encode("the cat")
    assert plain == tokenizer.encode("the cat")[1:]
    assert encoding.opening(silent) == []
    assert encoding.encode(silent, ["the cat"]) == [plain]
    assert encoding.encode_pairs(silent, [("", "the cat"), ("the", " cat")]) == [
        ([silent.bos_token_id], plain),
        (silent.encode("the"), plain[len(silent.encode("the")) :]),
    ]


def test_a_tokenizer_that_begins_with_more_than_bos_does_so_once(tokenizer):
    opening = copy.deepcopy(tokenizer)  # glm4's begins with two tokens
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert encoding.opening(opening) == [1, 0]
    assert encoding.encode(opening, ["the cat", "</s><s>the cat"]) == [opening.encode("the cat")] * 2
    pairs = [("the", " cat"), ("", "the cat")]
    assert encoding.encode_pairs(opening, pairs) == [([1, 0, plain[0]], plain[1:]), ([0], plain)]
    assert encoding.encode_pairs(opening, pairs) == [harness_rule(opening, *pair) for pair in pairs]


def test_bos_can_be_demanded_and_forbidden(tokenizer, tokenizer_without_bos):
    plain, bos = tokenizer.encode("the cat", add_special_tokens=False), tokenizer.bos_token_id
    silent = copy.deepcopy(tokenizer)
    silent.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for each in (tokenizer, silent):
        assert encoding.encode(each, ["the cat", "<s>the cat"], bos=True) == [[bos, *plain]] * 2
        assert encoding.encode(each, ["the cat", "<s>the cat"], bos=False) == [plain, [bos, *plain]]
        assert encoding.encode_pairs(each, [("the", " cat")], bos=True) == [([bos, plain[0]], plain[1:])]
        assert encoding.encode_pairs(each, [("the", " cat")], bos=False) == [(plain[:1], plain[1:])]
    with pytest.raises(ValueError, match=r"^bos: the tokenizer has no BOS token"):
        encoding.encode(tokenizer_without_bos, ["the cat"], bos=True)


def test_another_token_can_stand_for_an_empty_context(either):
    plain = either.encode("the cat", add_special_tokens=False)
    pairs = [("", "the cat"), ("", either.decode([7]) + "the cat")]
    assert encoding.encode_pairs(either, pairs[:1], prefix=7) == [([7], plain)]
    first, *rest = either.encode(pairs[1][1], add_special_tokens=False)
    assert encoding.encode_pairs(either, pairs[1:], prefix=first) == [([first], rest)]


@settings(max_examples=200, deadline=None)
@given(context=TEXT.filter(str.strip), continuation=TEXT.filter(bool))
@example(context="who kn", continuation="ows")
@example(context="the cat", continuation=" sat on")
@example(context="the ", continuation="0")  # shares no token with "the 0" behind a tokenizer of whole phrases
def test_whole_tokens_keep_the_tokens_of_the_whole_text(either, context, continuation):
    (before, after), (cut_before, cut_after) = (
        encoding.encode_pairs(either, [(context, continuation)], whole_tokens=whole)[0] for whole in (True, False)
    )
    whole = encoding.encode(either, [context + continuation])[0]
    alone = encoding.encode(either, [context.rstrip()])[0]
    if before != [encoding.prefix_token_id(either)]:  # else not even the first token was shared
        assert before + after == whole
        assert before == alone[: len(before)] or not alone
    if cut_before + cut_after == whole:
        assert (before, after) == (cut_before, cut_after)
    else:
        assert after[:1] != alone[len(before) : len(before) + 1]


def test_spanned_joins_are_logged_by_number(tokenizer, caplog):
    pairs = [("who kn", "ows"), ("the", " cat"), ("the cat who kn", "ows why")]
    for whole in (False, True):
        caplog.clear()
        encoding.encode_pairs(tokenizer, pairs, whole_tokens=whole)
        (record,) = caplog.records
        assert record.getMessage().startswith("2 of 3 continuations: a token spans the end of the context; ")
        assert ("lm-evaluation-harness" in record.getMessage()) != whole
    caplog.clear()
    encoding.encode_pairs(tokenizer, pairs[1:2])
    assert not caplog.records


def test_an_eos_that_the_tokenizer_appends_is_left_out(tokenizer):
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert closing.encode("the cat")[-1] == closing.eos_token_id
    assert encoding.encode(closing, ["the cat"]) == encoding.encode(tokenizer, ["the cat"])
    pairs = [("the", " cat"), ("", "the cat")]
    assert encoding.encode_pairs(closing, pairs) == encoding.encode_pairs(tokenizer, pairs)


def test_no_texts_are_no_ids(either):
    assert encoding.encode(either, []) == []


def test_a_tokenizer_with_neither_bos_nor_eos_cannot_begin_an_empty_context(tokenizer_without_bos):
    bare = copy.deepcopy(tokenizer_without_bos)
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"^tokenizer: has neither a BOS nor an EOS token"):
        encoding.encode_pairs(bare, [("", "the")])
    assert encoding.encode_pairs(bare, [("the", " cat")])[0][1]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, texts, **options):
        self.characters += sum(map(len, [texts] if isinstance(texts, str) else texts))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def sentencepiece_like(*, prepend, split):
    """A BPE tokenizer that writes spaces as \u2581, as Llama 2's (prepend) and Gemma's do."""
    backend = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next") if split else None
    backend.train_from_iterator(sentences(300), trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    backend.pre_tokenizer = None  # the pieces have kept words apart, as SentencePiece does in training
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


ONE_PART = {
    "pieces of several words": lambda fixture: fixture("tokenizer_without_bos"),
    "a space put before every text": lambda _: sentencepiece_like(prepend=True, split=True),
    "merges across spaces": lambda _: sentencepiece_like(prepend=False, split=False),
}
TWO_PARTS = {
    "byte-level, BOS": lambda fixture: fixture("tokenizer"),
    "unigram, space before a text": lambda _: build_tokenizer(),
    "no splitting into words": lambda _: sentencepiece_like(prepend=False, split=True),
}


def long_texts(rng, count=30):
    """Texts of two beginnings of some 4,000 characters; one in three goes on alike for another 800."""
    beginnings = [" ".join(rng.choices(sentences(50), k=150)) for _ in range(2)]
    more = " ".join(rng.choices(sentences(50), k=30))
    ends = [rng.choice(PIECES) + rng.choice(sentences(20)) + rng.choice(PIECES) for _ in range(count)]
    return [rng.choice(beginnings) + (more if rng.random() < 0.3 else "") + end for end in ends]


@pytest.mark.parametrize("kind", [*ONE_PART, *TWO_PARTS])
def test_a_shared_beginning_changes_no_token(kind, request):
    tokenizer = Counting((ONE_PART | TWO_PARTS)[kind](request.getfixturevalue))
    for seed in range(5):
        texts = long_texts(random.Random(seed))
        expected = [tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        opening = encoding.opening(tokenizer.tokenizer)
        expected = [opening + ids for ids in expected]
        tokenizer.characters = 0
        assert encoding.encode(tokenizer, texts) == expected
        given = sum(map(len, texts))
        assert (tokenizer.characters < given / 2) == (kind in TWO_PARTS), tokenizer.characters / given


def test_no_cut_beside_an_added_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("sat on", lstrip=True, rstrip=True)])
    texts = [
        text.replace("<s>", "") + " the cat sat on that mat" * 8 + end
        for text in long_texts(random.Random(0))
        for end in "ab"
    ]
    assert encoding.encode(tokenizer, texts) == [tokenizer(text)["input_ids"] for text in texts]
    assert encoding._shared_cut(tokenizer, [" the cat sat on that mat" * 1000] * 3) == 0
    assert encoding._shared_cut(tokenizer, [" the cat sat at that mat" * 1000] * 3) > 20_000
    turns = [" the cat sat at that mat" * 1000 + f"sat on the mat: {'cat ' * 12}{end}" for end in "abc"]
    assert 20_000 < encoding._shared_cut(tokenizer, turns) < turns[0].index("sat on")
    assert encoding.encode(tokenizer, turns) == [tokenizer(text)["input_ids"] for text in turns]
