"""Looking at attention: what layers attend to, and the heat map of the paper's Figure 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dla.nn.checks import integer
from dla.nn.recording import AttentionRecord, recordings
from dla_kernels.ops.common import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionRecord", "attention_matrix", "plot_attention", "record_attention"]


@contextmanager
def record_attention() -> Iterator[list[AttentionRecord]]:
    """Collects the attention of every `DLALayer` that is called inside the block.

    >>> with record_attention() as records:
    ...     model(images)

    Yields:
        A list to which each layer adds one record per call, in the order of the calls.
    """
    records: list[AttentionRecord] = []
    recordings.append(records)
    try:
        yield records
    finally:
        recordings[:] = [other for other in recordings if other is not records]


def attention_matrix(records: Sequence[AttentionRecord], stage: int = -1) -> Tensor:
    """Attention of the layers of one stage to each other, averaged over samples and heads.

    Args:
        records: of one forward pass of a model with ``variant="base"`` layers.
        stage: its number among the stages in ``records``; negative numbers count from the last.

    Returns:
        [L, L]: row l holds the scores of layer l, which sum to 1; NaN for layers after it.

    Raises:
        ValueError, TypeError: no such records, or no such stage.
    """
    integer("stage", stage)
    if not isinstance(records, Sequence):
        raise TypeError(f"records: expected a list of AttentionRecord, got {describe(records)}")
    stages: list[list[Tensor]] = []
    for entry in records:
        if not isinstance(entry, AttentionRecord):
            raise TypeError(f"records: expected a list of AttentionRecord, got {describe(entry)}")
        if entry.scores.dim() != 3:
            continue  # "light": attends to itself alone
        if len(entry.scores) == 1:
            stages.append([])
        if not stages or len(entry.scores) != len(stages[-1]) + 1:
            raise ValueError(
                "records: expected those of whole stages, one layer after the other, got one of a "
                f"layer that attends to {len(entry.scores)} where another was due"
            )
        stages[-1].append(entry.scores.mean(dim=(1, 2)).cpu())
    if not stages:
        raise ValueError("records: expected those of layers of variant='base', got none of any")
    if not -len(stages) <= stage < len(stages):
        raise ValueError(
            f"stage: expected one of the {len(stages)} stages with layers of variant='base' in "
            f"records, got {stage}"
        )
    rows = stages[stage]
    matrix = torch.full((len(rows), len(rows)), torch.nan, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def plot_attention(
    records: Sequence[AttentionRecord], stage: int = -1, ax: Axes | None = None
) -> Axes:
    """The heat map of Figure 2: how much each layer of a stage attends to each layer before it.

    Args:
        records, stage: see `attention_matrix`.
        ax: where to draw; None: a new figure.

    Returns:
        The axes drawn on.

    Raises:
        ValueError, TypeError: as `attention_matrix`; or ``ax`` is none.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import axes, pyplot
    except ImportError as error:
        raise ImportError(
            "plot_attention needs matplotlib: pip install 'dla-kernels[viz]'"
        ) from error
    matrix = attention_matrix(records, stage)
    if ax is None:
        _, ax = pyplot.subplots()
    if not isinstance(ax, axes.Axes):
        raise TypeError(f"ax: expected matplotlib's Axes or None, got {describe(ax)}")
    image = ax.imshow(matrix.numpy(), vmin=0.0)
    layers = range(len(matrix))
    ax.set(xlabel="layer attended to", ylabel="layer", xticks=layers, yticks=layers)
    ax.figure.colorbar(image, ax=ax, label="attention")
    return ax
