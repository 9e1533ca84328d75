"""One DLA-L layer: attention of a layer to itself and, through a gated feature, to earlier ones."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.cells import ACTIVATIONS, CELLS, INITIAL_STATES, Cell
from dla.nn.checks import one_of, positive_int
from dla.nn.drop import DropPath
from dla.nn.state import DLAState, check_state
from dla_kernels.ops.common import FEATURE_DTYPES, compute_dtype, describe, under_autocast
from dla_kernels.ops.light_attention import reference

VARIANTS = ("light",)
SPECS = ("paper", "official")
GATES = ("identity", "sigmoid")
CONTEXTS = ("per_sample", "first_sample")
SOURCES = ("output", "shortcut")
STATIC = "none"


class Form(NamedTuple):
    """The choices that a spec presets, each open to an argument of its own."""

    cell: str
    gate: str
    prev_conv: bool
    prev_from: str


def resolve_form(
    spec: str, cell: str | None, gate: str | None, prev_conv: bool | None, prev_from: str | None
) -> Form:
    """The preset of ``spec`` where an argument is None, else the argument."""
    paper = one_of("spec", spec, SPECS) == "paper"
    if cell is None:
        cell = "dsu" if paper else "dsu_split"
    static = one_of("cell", cell, (*CELLS, STATIC)) == STATIC
    if gate is None:
        gate = "identity" if paper or static else CELLS[cell].official_gate
    if prev_conv is None:
        prev_conv = not (paper or static)
    if prev_from is None:
        prev_from = "output" if paper and not static else "shortcut"
    return Form(
        cell,
        one_of("gate", gate, GATES),
        bool(prev_conv),
        one_of("prev_from", prev_from, SOURCES),
    )


def channel_kernel_size(channels: int) -> int:
    """ks(C): the odd size of the convolutions over the channel axis."""
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


def depthwise_conv(channels: int, spec: str) -> nn.Conv2d:
    """Depthwise 3x3 convolution; weights from N(0, 2 / 9), its fan being 9.

    ``spec="official"`` takes their N(0, 2 / (9 C)), the rule for dense convolutions.
    """
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    fan = 9 * channels if spec == "official" else 9
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 / fan))
    return conv


class DLALayer(nn.Module):
    """Dynamic layer attention, "light" (DLA-L)::

        y   = mean of x over space                       c' = cell(y, c)
        p'  = p * gate(cell(mean of p, c')) [+ prev_conv(p)]
        a   = sigmoid(q . k / sqrt(D)) per head          q, k = q_conv(y), k_conv(y)
        out = x + drop_path(norm(a * v_conv(x) + lam * p'))

    where p stands for what the layer before put out. A spec is a preset:

    ============= ===================================== ======================================
    argument      ``spec="paper"``                      ``spec="official"``
    ============= ===================================== ======================================
    ``cell``      "dsu"                                 "dsu_split"
    ``gate``      "identity"                            "identity", or "sigmoid" under "dsu"
    ``prev_conv`` False                                 True
    ``prev_from`` "output": o of the layer before,      "shortcut": the block's input, passed
                  zero for the first                    as ``prev``
    weights of    N(0, 2 / 9)                           N(0, 2 / (9 C))
    v_, prev_conv
    ============= ===================================== ======================================

    All other parameters start alike: q_conv and k_conv as torch.nn.Conv1d does, lam from N(0, 1),
    the cell as torch.nn.Linear does.

    ``cell="none"`` makes the static layer, MRLA-L: no gate, no state, p is the shortcut.

    ``norm`` may be replaced by any module that maps [B, C, H, W] to the same (SyncBatchNorm,
    frozen statistics, ...): it then is called on its own, between fused kernels. A plain
    torch.nn.BatchNorm2d without hooks is part of the fused step, in every one of its modes.

    Args:
        channels: C of the features.
        variant: "light".
        spec: "paper" or "official", see above.
        cell: "dsu", "dsu_split" or "none"; None: the spec's.
        reduction: the cell's hidden width is C // reduction.
        head_dim: channels of a head, lowered to C if larger.
        drop_path: probability of dropping a sample's attention branch while training.
        norm: whether there is a batch norm.
        fused: run as one fused operation per direction; otherwise as plain PyTorch. Parameters,
            random numbers and (up to rounding) results are the same. May be changed at any time.
        gate: "identity" or "sigmoid", on the cell's output; None: the spec's.
        prev_conv: whether the depthwise convolution of p is added; None: the spec's.
        context: "per_sample"; or "first_sample", a defect of the official code in which all gates
            of a batch read the context of its first sample: for checkpoints trained so.
        activation: of c inside "dsu": "sigmoid", "tanh", "relu" or "identity".
        initial_state: of the cell: "zeros", "normal" or "learned".
        eps, momentum: of the batch norm.
        shared: leave the cell and prev_conv to the owner of the layers (`DLAStage`), which passes
            them to every call.
        prev_from: "output" or "shortcut", where p comes from; None: the spec's.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "light",
        spec: str = "paper",
        cell: str | None = None,
        reduction: int = 4,
        head_dim: int = 32,
        drop_path: float = 0.0,
        norm: bool = True,
        fused: bool = True,
        gate: str | None = None,
        prev_conv: bool | None = None,
        context: str = "per_sample",
        activation: str = "sigmoid",
        initial_state: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        shared: bool = False,
        prev_from: str | None = None,
    ) -> None:
        super().__init__()
        one_of("variant", variant, VARIANTS)
        self.channels = positive_int("channels", channels)
        self.head_dim = min(positive_int("head_dim", head_dim), channels)
        if channels % self.head_dim:
            raise ValueError(
                f"head_dim: expected a divisor of channels={channels}, got {self.head_dim}"
            )
        self.spec, self.fused, self.shared = spec, fused, shared
        self.form = resolve_form(spec, cell, gate, prev_conv, prev_from)
        self.context = one_of("context", context, CONTEXTS)
        self.activation = one_of("activation", activation, ACTIVATIONS)
        one_of("initial_state", initial_state, INITIAL_STATES)
        self.cell = self.prev_conv = None
        if not shared:
            self.cell, self.prev_conv = shared_parts(
                channels, self.form, spec, reduction, activation, initial_state
            )
        size = channel_kernel_size(channels)
        self.q_conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.k_conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.v_conv = depthwise_conv(channels, spec)
        self.lam = nn.Parameter(torch.randn(channels))
        self.norm = nn.BatchNorm2d(channels, eps, momentum) if norm else None
        self.drop_path = DropPath(drop_path)

    def extra_repr(self) -> str:
        form = ", ".join(f"{name}={value!r}" for name, value in self.form._asdict().items())
        text = f"{self.channels}, spec={self.spec!r}, {form}, head_dim={self.head_dim}"
        return f"{text}, context={self.context!r}, fused={self.fused}"

    def forward(
        self,
        x: Tensor,
        prev: Tensor | None = None,
        state: DLAState | None = None,
        *,
        cell: Cell | None = None,
        prev_conv: nn.Conv2d | None = None,
        keep_output: bool = True,
    ) -> tuple[Tensor, DLAState]:
        """One layer step.

        Args:
            x: [B, C, H, W], float32, float64, bfloat16 or float16, as the parameters are (under
                autocast: any); output of the layer's block.
            prev: p, like x. Default under ``prev_from="output"``: the output in ``state``.
            state: what the layer before returned; None for the first layer of a stage.
            cell, prev_conv: the stage's, for a layer made with ``shared=True``.
            keep_output: False if no later layer will read this one's output: it may then be
                left out of the returned state, which spares writing it.

        Returns:
            out like x, and the state for the next layer of the stage.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        self._check_features(x)
        cell, prev_conv = self._parts(cell, prev_conv)
        dtype = compute_dtype(x.dtype)
        if state is not None:
            state = check_state(state, cell.slots if cell else 0, x, dtype)
            context = state.context
        elif cell is not None:
            context = cell.initial_state(x.shape[0], dtype, x.device)
        else:
            context = torch.empty((0, *x.shape[:2]), dtype=dtype, device=x.device)
        prev = self._previous(x, prev, state)
        out, o, context = self._step(x, prev, context, cell, prev_conv, keep_output)
        return out, DLAState(context, o, (x.shape[2], x.shape[3]))

    def _step(
        self,
        x: Tensor,
        prev: Tensor | None,
        context: Tensor,
        cell: Cell | None,
        prev_conv: nn.Conv2d | None,
        keep_output: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The fused step, or the attention alone followed by norm, drop path and residual."""
        keep_output = keep_output and self.form.prev_from == "output"
        norm, drop_path = self.norm, self.drop_path
        dtype = compute_dtype(x.dtype)
        tensors = (
            x,
            prev,
            context,
            _cast(cell.weights(), dtype) if cell is not None else [],
            *_cast(
                (
                    self.q_conv.weight,
                    self.k_conv.weight,
                    self.v_conv.weight,
                    None if prev_conv is None or prev is None else prev_conv.weight,
                    self.lam,
                ),
                dtype,
            ),
        )
        flags: dict[str, Any] = {
            "cell": self.form.cell,
            "activation": self.activation,
            "gate": self.form.gate,
            "context": self.context,
            "head_dim": self.head_dim,
        }
        attend = dla_kernels.light_attention if self.fused else reference.light_attention
        # The fused step stands for norm and drop_path only where it misses nothing that they do.
        fused_norm = norm is None or _is_plain(norm, nn.BatchNorm2d)
        if self.fused and fused_norm and _is_plain(drop_path, DropPath):
            mode, eps, norm_tensors = _batch_norm_arguments(norm, x, dtype)
            scale = drop_path.scale(x)
            out, o, context, mean, var, _ = attend(
                *tensors,
                *norm_tensors,
                None if scale is None else scale.flatten(),
                **flags,
                norm=mode,
                eps=eps,
                residual=True,
                return_o=keep_output,
            )
            if mode == "batch":
                _track_statistics(norm, mean, var, x.numel() // self.channels)
            return out, o if keep_output else None, context
        nothing = (None,) * 5
        o, _, context, *_ = attend(
            *tensors, *nothing, **flags, norm="none", eps=0.0, residual=False, return_o=False
        )
        branch = o if norm is None else norm(o)
        return x + drop_path(branch), o if keep_output else None, context

    def _parts(
        self, cell: Cell | None, prev_conv: nn.Conv2d | None
    ) -> tuple[Cell | None, nn.Conv2d | None]:
        """The cell and prev_conv of this call: the layer's own, or those of its owner."""
        cell = self.cell if cell is None else cell
        prev_conv = self.prev_conv if prev_conv is None else prev_conv
        kind = STATIC if cell is None else cell.kind
        if kind != self.form.cell:
            raise ValueError(
                f"cell: expected one of kind {self.form.cell!r}, got {kind!r}; a layer made with "
                "shared=True takes it from its caller"
            )
        if (prev_conv is not None) != self.form.prev_conv:
            raise ValueError(
                f"prev_conv: this layer was made with prev_conv={self.form.prev_conv}, "
                f"got {type(prev_conv).__name__}; a layer made with shared=True takes it from its "
                "caller"
            )
        return cell, prev_conv

    def _check_features(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        if x.dtype not in FEATURE_DTYPES:
            raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {describe(x)}")
        if x.dim() != 4 or x.shape[1] != self.channels or x.numel() == 0:
            raise ValueError(
                f"x: expected [B, {self.channels}, H, W] with B, H, W >= 1, got {describe(x)}"
            )
        lam = self.lam
        if x.device != lam.device:
            raise ValueError(
                f"x: expected it on {lam.device} with the layer's parameters, got {describe(x)}"
            )
        if x.dtype != lam.dtype and not under_autocast(x):
            raise TypeError(
                f"x: expected {lam.dtype} as the layer's parameters are (or autocast), "
                f"got {describe(x)}"
            )

    def _previous(self, x: Tensor, prev: Tensor | None, state: DLAState | None) -> Tensor | None:
        """p of this step; None stands for zeros."""
        if prev is None:
            if self.form.prev_from == "shortcut":
                raise ValueError(
                    "prev: expected the shortcut of the block (its input, downsampled in a "
                    f"stage's first block), {list(x.shape)}, got None; DLAStage passes it"
                )
            if state is None or state.output is None:
                return None
            prev = state.output
        if not isinstance(prev, Tensor):
            raise TypeError(f"prev: expected a Tensor or None, got {type(prev).__name__}")
        if prev.dtype != x.dtype and prev.is_floating_point() and under_autocast(x):
            prev = prev.to(x.dtype)
        if prev.shape != x.shape or prev.dtype != x.dtype or prev.device != x.device:
            raise ValueError(
                f"prev: expected shape, dtype and device of x, {describe(x)}, got {describe(prev)}"
            )
        return prev


class MRLALayer(DLALayer):
    """MRLA-L, the static counterpart: no cell, no gate, p is the shortcut, passed as ``prev``.

    Args as of `DLALayer`; ``spec`` only sets the initialisation.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "light",
        spec: str = "paper",
        head_dim: int = 32,
        drop_path: float = 0.0,
        norm: bool = True,
        fused: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(
            channels,
            variant,
            spec,
            STATIC,
            head_dim=head_dim,
            drop_path=drop_path,
            norm=norm,
            fused=fused,
            eps=eps,
            momentum=momentum,
        )


def shared_parts(
    channels: int,
    form: Form,
    spec: str,
    reduction: int,
    activation: str,
    initial_state: str,
) -> tuple[Cell | None, nn.Conv2d | None]:
    """What the layers of a stage share: the cell and prev_conv, as far as ``form`` has them."""
    cell = None
    if form.cell != STATIC:
        cell = CELLS[form.cell](channels, reduction, activation, initial_state)
    return cell, depthwise_conv(channels, spec) if form.prev_conv else None


def _batch_norm_arguments(
    norm: nn.BatchNorm2d | None, x: Tensor, dtype: torch.dtype
) -> tuple[str, float, Sequence[Tensor | None]]:
    """Mode and eps of the fused step, and its norm_weight, norm_bias, mean_in and var_in."""
    if norm is None:
        return "none", 0.0, (None,) * 4
    weights = norm.weight, norm.bias
    mean, var = norm.running_mean, norm.running_var
    if not norm.training and mean is not None and var is not None:
        return "running", norm.eps, _cast((*weights, mean, var), dtype)
    if x.numel() == x.shape[1]:
        # The words of torch.nn.functional.batch_norm.
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    return "batch", norm.eps, _cast((*weights, None, None), dtype)


def _track_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Updates running statistics as BatchNorm2d does: the variance unbiased, the mean of all
    batches so far under ``momentum=None``."""
    running_mean = norm.running_mean
    if not (norm.training and norm.track_running_stats) or running_mean is None:
        return
    factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    batches = norm.num_batches_tracked
    if batches is not None:
        batches.add_(1)
        if norm.momentum is None:
            factor = batches.to(running_mean.dtype).reciprocal()
    mean, unbiased = _cast((mean, var * (count / (count - 1))), running_mean.dtype)
    running_mean.lerp_(mean, factor)
    norm.running_var.lerp_(unbiased, factor)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` does what ``kind`` does, and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]
