"""The reasoning that a model writes before its answer, told from the answer by its marks."""

from __future__ import annotations

import re

# How models begin and end their reasoning: DeepSeek and Qwen, prompts of one's own and Reflection, LongCat, K2,
# Magistral, Seed, Kimi, Open-Thoughts, Command, Gemma 4, Apertus.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<reflection>", "</reflection>"),
    ("<inner_thoughts>", "</inner_thoughts>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<internal_monologue>", "</internal_monologue>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<think_fast>", "</think_fast>"),
    ("<think_faster>", "</think_faster>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
_BEGINS = {mark[0] for pair in MARKS for mark in pair}
_CHANNEL = re.compile(
    r"<\|channel\|>(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|(?:end|return|channel|start|call)\|>|$)",
    re.DOTALL,
)
# The same channels where their control tokens were left out, and Granite's two headings.
_HEADINGS = (
    re.compile(r"\s*analysis(?:.*?assistantfinal(.*)|(?=[A-Z]).*)", re.DOTALL),
    re.compile(r"\s*Here(?:'s| is) my thought process:.*?(?:Here(?:'s| is) my response:(.*)|$)", re.DOTALL),
)
_WRAPPERS = re.compile(
    r"</?(?:answer|response|output|final_answer)>|<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>",
    re.IGNORECASE,
)


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a model's text.

    Reasoning without its beginning, which the prompt wrote, is all before its end; without its end, which was cut off,
    all behind its beginning. Of channels (gpt-oss) the answer is the one called final.
    """
    if not any(begin in text for begin in _BEGINS):  # asked of every token of a stream
        return "", text
    if channels := _CHANNEL.findall(text):
        thought = [said for name, said in channels if name != "final"]
        return "\n".join(thought), "\n".join(said for name, said in channels if name == "final")
    reasoning = []
    for begin, end in MARKS:
        folded = text.casefold()
        if begin.casefold().rstrip(">") not in folded and end.casefold().rstrip(">") not in folded:
            continue
        pattern = re.compile(f"({_loose(begin)})|{_loose(end)}", re.IGNORECASE)
        depth, kept, last = 0, "", 0
        for match in pattern.finditer(text):
            said = text[last : match.start()]
            if depth:
                reasoning.append(said)
            elif match[1]:
                kept += said
            else:  # an end whose beginning the prompt wrote
                reasoning.append(kept + said)
                kept = ""
            depth = depth + 1 if match[1] else max(0, depth - 1)
            last = match.end()
        if depth:
            reasoning.append(text[last:])
        else:
            kept += text[last:]
        text = kept
    return "\n".join(part.strip() for part in reasoning if part.strip()), text


def _loose(mark: str) -> str:
    """A pattern of a mark; one in angle brackets may have spaces or attributes before its end."""
    is_tag = re.fullmatch(r"</?[\w:]+>", mark)
    return rf"{re.escape(mark[:-1])}(?:\s[^<>]*)?>" if is_tag else re.escape(mark)


def answer_in(text: str) -> str:
    """The answer in a model's whole text, without its reasoning and without marks of an answer around it."""
    for heading in _HEADINGS:
        if found := heading.fullmatch(text):
            text = found[1] or ""
    return _WRAPPERS.sub("", split_reasoning(text)[1])


def opened(prompt: str) -> str:
    """The mark that a prompt ends in, so that what follows is reasoning; empty if it does not."""
    end = prompt.rstrip()
    return next((begin for begin, _ in MARKS if end.endswith(begin)), "")
