# ruff: noqa: RUF001
"""Small tokenizers of ten kinds, each with the chat template of its family, trained on a few made-up sentences."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the quick brown fox jumps over the lazy dog. Paris is the capital of France, Berlin of Germany.",
    "who knows why that mat? user system assistant\n\nbe brief. yes no 0 1 2 3 4 5 6 7 8 9 über",
] * 20
SIZE = 420

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Thoughts: DeepSeek-R1's generation prompt opens one, and no turn shows one; Qwen3 shows those after the last question.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}<｜User｜>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = "
    "m.content.split('</think>') %}{% if loop.index0 > ns.last and (loop.last or parts | length > 1) %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _finished(tokenizer, controls, chat, *, bos, eos, adds_bos, strip=False):
    tokenizer.add_special_tokens([AddedToken(c, rstrip=strip, normalized=False, special=True) for c in controls])
    if adds_bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    made.chat_template = chat
    return made


def _byte_level(chat, controls=(), *, bos=None, eos="</s>", adds_bos=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(t for t in (bos, eos, *controls) if t))
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _finished(tokenizer, special, chat, bos=bos, eos=eos, adds_bos=adds_bos)


def _metaspace(chat, controls=(), *, scheme="always", model=models.BPE, adds_bos=True, strip=False):
    """Words with a mark for the space before them; without a scheme, a text's first word has none."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainers_of = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer}
    learner = Tokenizer(model(unk_token="<unk>") if model is models.BPE else model())
    if scheme is None:
        learner.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    options = {"unk_token": "<unk>"} if model is models.Unigram else {}
    trainer = trainers_of[model](vocab_size=SIZE + 256, special_tokens=special, show_progress=False, **options)
    learner.train_from_iterator(TEXTS, trainer)
    written = json.loads(learner.to_str())
    written["added_tokens"] = [added for added in written["added_tokens"] if added["content"] in special[:3]]
    written["model"]["byte_fallback"] = True
    learner = Tokenizer.from_str(json.dumps(written))
    learner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(learner, [*special[:3], *controls], chat, bos="<s>", eos="</s>", adds_bos=adds_bos, strip=strip)


KINDS = {
    "llama 2": functools.partial(_metaspace, LLAMA2),
    "llama 3": functools.partial(
        _byte_level,
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
    ),
    "qwen": functools.partial(_byte_level, QWEN3, ("<|im_start|>",), eos="<|im_end|>"),
    "phi": functools.partial(
        _metaspace, PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), adds_bos=False, strip=True
    ),
    "gemma": functools.partial(_metaspace, GEMMA, ("<start_of_turn>", "<end_of_turn>"), scheme=None),
    "smollm": functools.partial(_byte_level, CHATML, ("<|im_end|>",), bos="<|im_start|>", eos="<|im_end|>"),
    "deepseek": functools.partial(
        _byte_level,
        R1,
        ("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        adds_bos=True,
    ),
    "mistral": functools.partial(_metaspace, MISTRAL, ("[INST]", "[/INST]"), scheme="first"),
    "byte-level": functools.partial(_byte_level, PLAIN),
    "unigram": functools.partial(_metaspace, PLAIN, model=models.Unigram),
}


@functools.cache
def make(kind):
    """A tokenizer of a kind; not to be changed."""
    return KINDS[kind]()
