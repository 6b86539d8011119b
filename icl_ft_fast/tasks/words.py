"""Pronounceable nonsense nouns of four or five letters: an opening (onset and vowel) and a close.

The space of words is split once and for all by a checksum: one word in eight is held out. Tasks draw from the
held-out words and the shipped model trains on the others, so no test word is ever in its training text. Knows
nothing of tokenizers, models or data sets.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection
from functools import cache

_ONSETS = "b d f g h j k l m n p r s t v w y z bl br cl dr fl gl gr pl sk sn sp st tr".split()
_VOWELS = "aeiou"
_CLOSING_ONSETS = "bdfgklmnprstvwxz"
_CODAS = "mp ff nk rt sk lm nd st lt rn ll ss".split()

OPENINGS = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
CLOSES = tuple(onset + vowel for onset in _CLOSING_ONSETS for vowel in _VOWELS) + tuple(_CODAS)
HELD_OUT_FRACTION = 1 / 8

# What the pieces also spell and is never drawn: words of the templates' English, and words nobody wants in a table.
NOT_NONSENSE = frozenset(
    "have kind less more most none note rule same some were will "
    "dago homo kike nazi niga paki piss pube puss puta rape wank".split()
)

# The held-out words that English has: in Webster's dictionary of 1934 or GCIDE, known to pyspellchecker, or commoner
# than 3 in 10 million words (wordfreq), names and brands included. Drawn unless excluded; see sample_words().
ENGLISH = frozenset(
    """
    baba bake bare barn bass baze bena bike birn bito bize blade blaff blend blest bogo bonk bort brand brast brede
    brill brose brule bruta buna clavi cliff clima clomp clone dali dana dave degu demo dere dern dess didi dina dive
    doko dola dome doni dote drano drill duke dure durn fade faff fama faso fata fell fend fest fide file flaff fone
    full fund fust gabi gape gink girt glade glama glide gliff gore goss goto grand grano grebo greta grill grind grist
    gruff gula hadi haku hana haru hemo here hern hess hina hive hola home hote huke hure huss jade jama javi jell jeri
    jest jiff jima jolt jova juno juri just kago kart kero kink kipe koba kore korn koto kuda kula lall land lari last
    lede leta levi lifo lill lind lino lipa list lobe loka lolo lora lose luff mako mala mame mani maro mask mate mego
    mida miko mila mime mini miro mite modi mona move moxo nake namo nare nasa nato naze neve nike nito nogo nope novo
    page pali pave peba pegu peke pere pern pesa pess peto pili pina plaga plane plebe poda pola pome pote puke pure
    rade raff ragi rale rama rata ravi reki rend reno rest ride riff rigi rile rima rita romp rone roti rowe rull rupa
    rust sago sank sart saxe seme sero sink sipe sirt sisi situ skere skidi skive skoda snite snurt soba soke sore sorn
    sosa soss soto spank spart spink spirt spoke spore spume spute stamp stane stife stilt stine stoff stole stoma sufi
    sula taki tall tano tapa tari taxa teff tele tema tiki till tind tino tobe todo tofu topi tora tose trewe tribe
    troll trubu trump tuff tule vare vasa vena vire visa vito walm walt wamp wane wawe weka wese wife wilt wimp wine
    wode yada yate yite yugo yurt yutu zogo zonk zope
    """.split()
)


def is_held_out(word: str) -> bool:
    """Whether `word` is kept for tasks and out of the shipped model's training text."""
    return zlib.crc32(word.encode()) % round(1 / HELD_OUT_FRACTION) == 0


def sample_word(rng: random.Random, *, held_out: bool) -> str:
    """One word of the held-out part or of the training part, uniformly."""
    while True:
        word = rng.choice(OPENINGS) + rng.choice(CLOSES)
        if is_held_out(word) == held_out and word not in NOT_NONSENSE:
            return word


@cache
def _space(held_out: bool) -> frozenset[str]:
    """The words of the held-out part or of the training part."""
    words = {opening + close for opening in OPENINGS for close in CLOSES} - NOT_NONSENSE
    return frozenset(word for word in words if is_held_out(word) == held_out)


def sample_words(rng: random.Random, count: int, *, held_out: bool = True, exclude: Collection[str] = ()) -> list[str]:
    """`count` distinct words, none of them in `exclude`: ENGLISH, a tokenizer's words, what a training text wrote.

    Raises:
        ValueError: more words than there are.
    """
    most = len(_space(held_out)) - len(_space(held_out).intersection(exclude))
    if count > most:
        raise ValueError(f"count: at most {most} distinct nonsense words can be drawn, got {count}")
    words: dict[str, None] = {}
    while len(words) < count:
        word = sample_word(rng, held_out=held_out)
        if word not in exclude:
            words[word] = None
    return list(words)
