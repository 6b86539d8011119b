"""Rows of a cache during decoding, simulated: each running sequence sees its own path and nothing else."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.engine.allocator import RowAllocator

PROMPT = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5).map(tuple)


def common(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Simulation:
    """What a decoder does with an allocator, with the prefix that each row stands for beside it."""

    def __init__(self, prompts, lengths, most_running, slack):
        self.queue = sorted(zip(prompts, lengths, range(len(prompts)), strict=True))
        self.most_running, self.running = most_running, {}  # number -> [prompt, length, generated]
        needs = [len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)]
        self.rows = RowAllocator(min(sum(needs), most_running * max(needs) + max(needs) + slack))
        self.held = [()] * len(self.rows.end_k)  # the prefix whose last token a row holds
        self.entered, self.done, self.squeezed = (), [], 0

    def see(self, row, prefix):
        """The rows that this one sees are its path, once each."""
        seen = [self.held[j] for j in range(row + 1) if row < self.rows.end_k[j]]
        assert sorted(seen, key=len) == [prefix[:n] for n in range(1, len(prefix) + 1)]
        assert self.rows.depth_k[row] == len(prefix) - 1

    def needed(self):
        prompt, length, _ = self.queue[0]
        return length - 1 + (0 if prompt == self.entered else len(prompt) - common(prompt, self.entered))

    def step(self, rng):
        if self.queue and not self.rows.has_room(self.needed()):
            keep = self.rows.squeeze(common(self.queue[0][0], self.entered))
            if keep is not None:
                self.squeezed += 1
                self.held[: len(keep)] = [self.held[i] for i in keep.tolist()]
        numbers = list(self.running)
        prefixes = [(*self.running[n][0], *self.running[n][2]) for n in numbers]
        depth = torch.tensor([len(prefix) - 1 for prefix in prefixes], dtype=torch.int32)
        filled = self.rows.fill(numbers, [len(self.running[n][2]) - 1 for n in numbers], depth)
        for row, prefix in zip(filled.tolist(), prefixes, strict=True):
            self.held[row] = prefix
            self.see(row, prefix)
        entered = 0
        while self.queue and len(self.running) < self.most_running and self.rows.has_room(self.needed()):
            prompt, length, number = self.queue.pop(0)
            if prompt != self.entered:
                shared = common(prompt, self.entered)
                rows = self.rows.enter(torch.arange(shared, len(prompt), dtype=torch.int32))
                for row, n in zip(rows.tolist(), range(shared, len(prompt)), strict=True):
                    self.held[row] = prompt[: n + 1]
                for row, n in zip(rows.tolist(), range(shared, len(prompt)), strict=True):
                    self.see(row, prompt[: n + 1])
                self.entered = prompt
            self.rows.reserve(number, length - 1)
            self.running[number] = [prompt, length, []]
            entered += 1
        assert entered or self.running
        for number, (_, length, generated) in list(self.running.items()):
            generated.append(1000 * (number + 1) + len(generated))  # no other sequence's token
            if len(generated) == length or rng.random() < 0.1:
                self.rows.release(number)
                self.done.append(number)
                del self.running[number]


@settings(deadline=None, max_examples=200)
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=14),
    most_running=st.integers(1, 5),
    slack=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_every_sequence_sees_its_own_path_whatever_is_squeezed(prompts, most_running, slack, seed):
    rng = random.Random(seed)
    simulation = Simulation(prompts, [rng.randint(1, 4) for _ in prompts], most_running, slack)
    for _ in range(10 * len(prompts) + 10):
        if not simulation.queue and not simulation.running:
            break
        simulation.step(rng)
    assert sorted(simulation.done) == list(range(len(prompts)))


def test_a_full_cache_is_squeezed_once_until_something_is_released():
    rows = RowAllocator(6)
    rows.enter(torch.arange(3, dtype=torch.int32))
    rows.reserve("a", 2)
    assert not rows.has_room(2)
    assert rows.squeeze(1).tolist() == [0, 1, 2, 3, 4]  # a prompt's rows are seen by what is generated after it
    assert rows.squeeze(1) is None
    rows.release("a")
    assert rows.squeeze(1).tolist() == [0]
