"""A classifier in a plain training loop: evaluation, a learning-rate scheduler, a checkpoint, and resuming from it.

    python examples/classifier.py                               # 10 epochs, about ten seconds on one core
    python examples/classifier.py --save run.pt --steps 60      # stop early and save everything
    python examples/classifier.py --resume run.pt               # go on to the very same numbers

Data: the 1,797 images of 8x8 pixels that scikit-learn ships.
"""

import argparse
import os

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac import KFAC


def digits():
    """Images [N, 1, 8, 8] in [0, 1] and labels [N]: 1,397 to train on and 400 to test on, in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    return (images[:-400], labels[:-400]), (images[-400:], labels[-400:])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


@torch.no_grad()
def evaluate(model, criterion, data):
    model.eval()
    output = model(data[0])
    model.train()
    return float(criterion(output, data[1])), float((output.argmax(1) == data[1]).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=140, help="stop after so many steps (140 is 10 epochs)")
    parser.add_argument("--small", action="store_true", help="8 steps: only to see that it runs")
    parser.add_argument("--save", metavar="FILE", help="write a checkpoint at the end")
    parser.add_argument("--resume", metavar="FILE", help="go on from a checkpoint")
    arguments = parser.parse_args()
    steps, batch_size = 8 if arguments.small else arguments.steps, 100

    torch.manual_seed(0)
    train, test = digits()
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss=criterion)  # tunes itself; `lr` is then a multiplier, 1.0, for schedulers
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[112], gamma=0.3)
    print(optimizer.summary())

    start = 0
    if arguments.resume:
        saved = torch.load(arguments.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        start = saved["step"]

    per_epoch = -(-len(train[0]) // batch_size)
    for step in range(start, steps):
        epoch, part = divmod(step, per_epoch)
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(epoch))
        chosen = order[part * batch_size : (part + 1) * batch_size]
        loss = criterion(model(train[0][chosen]), train[1][chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if part == per_epoch - 1 or step == steps - 1:
            test_loss, accuracy = evaluate(model, criterion, test)
            measured = f"loss {loss.item():.6f}  test loss {test_loss:.4f}  accuracy {accuracy:.1%}"
            print(f"step {step + 1:4}  {measured}  alpha {optimizer.stats['alpha'].item():.3f}")

    if arguments.save:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({**states, "step": steps}, arguments.save + ".new")
        os.replace(arguments.save + ".new", arguments.save)  # never half a file


if __name__ == "__main__":
    main()
