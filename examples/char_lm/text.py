"""The text that the example trains on: Python's help topics, so that nothing is downloaded."""

from dataclasses import dataclass
from pydoc_data import topics

import torch
from torch import Tensor

CONTEXT = 64
BATCH = 16
HELD_OUT_SHARE = 0.1
NUM_EVALUATION_BATCHES = 4


@dataclass(frozen=True)
class Text:
    """Characters as numbers, split into training text and the held-out text after it."""

    train: Tensor
    held_out: Tensor
    num_symbols: int


def load_text() -> Text:
    """Return the help topics that come with Python, in the order of their names."""
    characters = "".join(topics.topics[name] for name in sorted(topics.topics))
    numbers = {character: i for i, character in enumerate(sorted(set(characters)))}
    encoded = torch.tensor([numbers[character] for character in characters])
    split = round(len(encoded) * (1 - HELD_OUT_SHARE))
    return Text(encoded[:split], encoded[split:], len(numbers))


def baselines(text: Text) -> dict[str, float]:
    """Return the held-out cross-entropies, in nats, of two models that only count characters.

    Counts are of the training text, plus one so that nothing has probability zero. The unigram
    model counts characters, the bigram model pairs of consecutive characters.
    """
    size = text.num_symbols
    unigram = torch.bincount(text.train, minlength=size).double() + 1
    pairs = text.train[:-1] * size + text.train[1:]
    bigram = torch.bincount(pairs, minlength=size * size).double().view(size, size) + 1
    unigram_nats = -(unigram / unigram.sum()).log()
    bigram_nats = -(bigram / bigram.sum(dim=1, keepdim=True)).log()
    before, after = text.held_out[:-1], text.held_out[1:]
    return {
        "unigram": unigram_nats[text.held_out].mean().item(),
        "bigram": bigram_nats[before, after].mean().item(),
    }


def windows(part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return one row of inputs per start, and targets: the same rows, one character later."""
    rows = part[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_batch(
    text: Text, generator: torch.Generator, size: int = BATCH
) -> tuple[Tensor, Tensor]:
    """Return `size` windows from random places of the training text."""
    starts = torch.randint(len(text.train) - CONTEXT, (size,), generator=generator)
    return windows(text.train, starts)


def held_out_batches(
    text: Text, num_batches: int = NUM_EVALUATION_BATCHES
) -> list[tuple[Tensor, Tensor]]:
    """Return the same evenly spread windows every time."""
    last = len(text.held_out) - CONTEXT - 1
    starts = torch.linspace(0, last, num_batches * BATCH).long()
    return [windows(text.held_out, some) for some in starts.split(BATCH)]
