"""K-FAC's curvature in front of an optimizer that you already use: AdamW with and without it.

    python examples/preconditioner.py

`Preconditioner.step()` turns every `.grad` of a layer with a block into a natural gradient. The optimizer behind it
keeps its own rules: its rate, momentum, weight decay, schedule. Nothing else of a loop changes.

Problem: the autoencoder 64-128-64-32-8-32-64-128-64 on the 1,797 images of 8x8 pixels that scikit-learn ships.
"""

import argparse
import time
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac import Preconditioner


def network():
    sizes = [64, 128, 64, 32, 8, 32, 64, 128, 64]
    model = nn.Sequential()
    for i, (d_in, d_out) in enumerate(pairwise(sizes)):
        model.append(nn.Linear(d_in, d_out))
        nn.init.xavier_normal_(model[-1].weight, gain=5 / 3)
        nn.init.zeros_(model[-1].bias)
        if i not in (3, 7):  # the code and the output are linear
            model.append(nn.Tanh())
    return model


def train(images, lr, steps, with_curvature):
    torch.manual_seed(0)
    model, criterion = network(), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    preconditioner = None
    if with_curvature:
        preconditioner = Preconditioner(model, loss=criterion, factor_interval=2, inverse_interval=10)
    seconds, losses = 0.0, []
    for step in range(steps):
        order = torch.randint(len(images), (256,), generator=torch.Generator().manual_seed(step))
        started = time.perf_counter()
        loss = criterion(model(images[order]), images[order])
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if (step + 1) % max(steps // 4, 1) == 0:
            with torch.no_grad():
                losses.append(criterion(model(images), images).item())
    return losses, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="4 steps, one rate: only to see that it runs")
    arguments = parser.parse_args()
    steps, rates = (4, [3e-3]) if arguments.small else (arguments.steps, [1e-3, 3e-3, 1e-2])

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    for with_curvature in (False, True):
        for lr in rates:
            losses, seconds = train(images, lr, steps, with_curvature)
            name = "Preconditioner + AdamW" if with_curvature else "AdamW"
            print(f"{name:22}  lr {lr:<6}  loss " + "  ".join(f"{x:.4f}" for x in losses) + f"  {seconds:.1f} s")


if __name__ == "__main__":
    main()
