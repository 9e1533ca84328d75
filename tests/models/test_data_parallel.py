"""DistributedDataParallel over two CPU processes averages the gradients of the two halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dla.models import create_model
from tolerances import MODELS, assert_gradients_close

WORLD = 2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet20_dla_l", drop_path=0.0).double()


def share(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module, rank: int) -> dict[str, Tensor]:
    model(share(rank)).square().sum().backward()
    return {key.removeprefix("module."): p.grad for key, p in model.named_parameters()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    model = DistributedDataParallel(make_model())
    torch.save(gradients(model, rank), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    alone = [gradients(make_model(), rank) for rank in range(WORLD)]
    mean = {key: sum(g[key] for g in alone) / WORLD for key in alone[0]}
    for rank in range(WORLD):
        averaged = torch.load(tmp_path / f"{rank}.pt")
        assert_gradients_close(averaged, mean, case=torch.float64, table=MODELS)
