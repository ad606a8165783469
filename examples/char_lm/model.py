"""A small GPT over characters."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

from .text import CONTEXT

# Two CPU cores train this model in half a minute. It has as many small tensors as a real model.
WIDTH = 96
HEADS = 4
LAYERS = 10


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron; each normalizes its input first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.perceptron_norm = nn.LayerNorm(WIDTH)
        self.perceptron_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.perceptron_out = nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        """Mix each position with those before it; `x` is (batch, length, width)."""
        batch, length, _ = x.shape
        mixed = self.query_key_value(x).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(heads.transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Add the outputs of attention and perceptron to the residual stream `x`."""
        x = x + self.attend(self.attention_norm(x))
        hidden = F.gelu(self.perceptron_in(self.perceptron_norm(x)))
        return x + self.perceptron_out(hidden)


class CharacterModel(nn.Module):
    """A GPT: symbol and position embeddings, blocks, and logits for the next character."""

    def __init__(self, num_symbols: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, num_symbols)
        self.apply(self._init)
        for block in self.blocks:
            # Keeps the residual stream's variance from growing with depth.
            block.attention_out.weight.data.div_(math.sqrt(2 * LAYERS))
            block.perceptron_out.weight.data.div_(math.sqrt(2 * LAYERS))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits (batch, length, symbols) for `symbols` (batch, length)."""
        positions = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.symbols(symbols) + self.positions(positions)
        return self.logits(self.norm(self.blocks(x)))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
