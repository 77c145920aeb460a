"""A small transformer language model on characters: self-tuning K-FAC beside AdamW, on Python's own source code.

    python examples/language_model.py                           # about half a minute on one core

Both start from the same weights and see the same batches; AdamW has the best of four rates. Watch steps and seconds:
K-FAC needs fewer steps, and on a network this small each of them costs several of AdamW's.
Attention is built from `nn.Linear`, so that all its weights get curvature blocks (inside `nn.MultiheadAttention` they
would be trained by AdamW). The decoder's weight is the embedding's: one block for both.
"""

import argparse
import inspect
import math
import time
from importlib import import_module

import torch
from torch import nn
from torch.nn import functional as F

from kfac import KFAC

MODULES = ("argparse", "ast", "configparser", "difflib", "doctest", "inspect", "tarfile", "typing", "zipfile")
LENGTH, HEADS = 32, 4  # characters that the model sees; attention heads


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm_attention(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    def __init__(self, symbols, width):
        super().__init__()
        self.embedding, self.position = nn.Embedding(symbols, width), nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, symbols, bias=False)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.decoder(self.norm(self.layers(x)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--small", action="store_true", help="4 steps of a tiny model: only to see that it runs")
    arguments = parser.parse_args()
    steps, width, batch = (4, 16, 8) if arguments.small else (arguments.steps, 64, 64)

    text = "".join(inspect.getsource(import_module(name)) for name in MODULES)
    symbols = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
    tokens = torch.tensor([symbols[symbol] for symbol in text])
    windows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    train, test = windows[:-512], windows[-512:]
    guess = math.log(len(symbols))
    print(f"{len(text):,} characters, {len(symbols)} different ones; loss of a uniform guess {guess:.2f}")

    criterion = nn.CrossEntropyLoss()
    for name in ("AdamW", "KFAC"):
        torch.manual_seed(0)
        model = LanguageModel(len(symbols), width)
        optimizer = KFAC(model, loss=criterion) if name == "KFAC" else torch.optim.AdamW(model.parameters(), lr=1e-2)
        seconds = 0.0
        for step in range(steps):
            chosen = train[torch.arange(step * batch, (step + 1) * batch) % len(train)]
            started = time.perf_counter()
            loss = criterion(model(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - started
            if (step + 1) % max(steps // 5, 1) == 0:
                with torch.no_grad():
                    held_out = criterion(model(test[:, :-1]).flatten(0, 1), test[:, 1:].flatten())
                print(f"{name:6} step {step + 1:4}  {seconds:6.1f} s  batch {loss.item():.3f}  test {held_out:.3f}")

    print(optimizer.summary())


if __name__ == "__main__":
    main()
