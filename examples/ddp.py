"""Two processes train one model with `DistributedDataParallel`: gradients and curvature are averaged over ranks.

    python examples/ddp.py

The script starts both processes itself (gloo, CPU). Each rank sees its own half of every batch. In the end it asserts
that the ranks hold the same weights and the same factors, bit for bit.
"""

import argparse
import os
import tempfile

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from kfac import KFAC

RANKS = 2


def assert_ranks_agree(name, tensor):
    copies = [torch.empty_like(tensor) for _ in range(RANKS)]
    distributed.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copies[0], copy) for copy in copies), f"{name} differs between ranks"


def train(rank, steps, meeting_point):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same data and first weights on every rank
    inputs = torch.randn(4096, 64)
    labels = (inputs @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model = DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss=criterion)  # give it the wrapper: so it knows of the other ranks

    for step in range(steps):
        batch = torch.randint(len(inputs), (256,), generator=torch.Generator().manual_seed(step))
        mine = batch[rank::RANKS]
        loss = criterion(model(inputs[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(steps // 5, 1) == 0:
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1:4}  loss {mean.item() / RANKS:.6f}", flush=True)

    for name, parameter in model.named_parameters():
        assert_ranks_agree(name, parameter.detach())
    for name, layer in optimizer.curvature().items():
        assert_ranks_agree(f"A of {name}", layer.A)
        assert_ranks_agree(f"G of {name}", layer.G)
    if rank == 0:
        print("ranks agree: weights and factors are equal, bit for bit")
    distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="6 steps: only to see that it runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = os.path.join(folder, "meeting_point")
        steps = 6 if arguments.small else arguments.steps
        multiprocessing.spawn(train, args=(steps, meeting_point), nprocs=RANKS)


if __name__ == "__main__":
    main()
