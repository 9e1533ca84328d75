"""Train a small DLA network on real images in a minute, offline.

The data are the 1797 handwritten digits that scikit-learn brings along (8x8 pixels), enlarged to
32x32; every fourth is held out.

    python examples/train_digits.py --model resnet20_dla_l --steps 200
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla.models import create_model


class Split(NamedTuple):
    """Images [N, 3, 32, 32] float32, normalised, and labels [N] int64."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Split, Split]:
    """The training and the held-out split, the same ones every time."""
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)  # CPUs convolve faster so
    labels = torch.from_numpy(data.target).long()
    held_out = torch.arange(len(labels)) % 4 == 0
    return Split(images[~held_out], labels[~held_out]), Split(images[held_out], labels[held_out])


def batches(split: Split, size: int, steps: int, seed: int) -> Iterator[Split]:
    """``steps`` batches, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(split.labels), generator=generator)])
        chosen, order = order[:size], order[size:]
        yield Split(split.images[chosen], split.labels[chosen])


def train(model: nn.Module, split: Split, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """SGD as in the CIFAR recipe; few steps want one rise and fall of lr, and smoothed labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step, (images, labels) in enumerate(batches(split, batch, steps, seed), start=1):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Fraction of ``split`` that the model classifies correctly, in evaluation mode."""
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in split.images.split(128)])
    return (predicted == split.labels).float().mean().item()


def run(name: str, *, steps: int, batch: int, lr: float, seed: int, **options: str | bool) -> float:
    """Train a fresh model and return its held-out accuracy. ``options`` go to create_model."""
    torch.manual_seed(seed)
    training, held_out = load_digits()
    model = create_model(name, num_classes=10, **options).to(memory_format=torch.channels_last)
    train(model, training, steps=steps, batch=batch, lr=lr, seed=seed)
    return accuracy(model, held_out)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, not {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20_dla_l", help="see dla.models.list_models()")
    parser.add_argument("--spec", choices=["paper", "official"], help="of layer attention")
    parser.add_argument("--unfused", action="store_true", help="layer attention in plain PyTorch")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=24)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options: dict[str, str | bool] = {"spec": args.spec} if args.spec else {}
    if args.unfused:
        options["fused"] = False
    try:  # before the data are loaded; not every model has every option
        create_model(args.model, **options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    start = time.perf_counter()
    score = run(
        args.model, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, **options
    )
    print(f"held-out accuracy {score:.2%} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
