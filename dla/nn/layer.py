"""One DLA layer: attention of a layer to itself and to earlier layers of its stage."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.batch_norm import (
    NO_NORM,
    BatchNormArguments,
    batch_norm,
    batch_norm_arguments,
    is_plain,
    is_unhooked,
    track_statistics,
)
from dla.nn.batch_norm import join as join_parts
from dla.nn.cells import Cell
from dla.nn.checks import boolean, check_features, match_autocast, positive_int
from dla.nn.drop import DropPath
from dla.nn.form import (
    DepthwiseConv,
    channel_kernel_size,
    check_kind,
    resolve_form,
    shared_parts,
)
from dla.nn.recalled import LightArguments, Recalled, recall
from dla.nn.recording import record, recordings
from dla.nn.state import DLAState, check_memory, check_state, check_tensors, stage_of
from dla.nn.tensors import cast, child, parameter
from dla_kernels.ops.base_attention import reference as base_reference
from dla_kernels.ops.checks import like, one_of
from dla_kernels.ops.common import compute_dtype, describe
from dla_kernels.ops.light_attention import reference as light_reference
from dla_kernels.ops.step_checks import CONTEXTS, STATIC


class DLALayer(nn.Module):
    """Dynamic layer attention. With y the mean of x over space and c' = cell(y, c):

    ``variant="light"`` (DLA-L) attends to itself and, through a gated feature p that stands for
    the output of the layer before, to earlier layers (Eq. 3-6)::

        p'  = p * gate(cell(mean of p, c')) [+ prev_conv(p)]
        a   = sigmoid(q . k / sqrt(D)) per head          q, k = q_conv(y), k_conv(y)
        out = x + drop_path(norm(a * v_conv(x) + lam * p'))

    ``variant="base"`` (DLA-B) attends to every layer of the stage so far (Eq. 2)::

        K_t = K_t * gate(cell(K_t, c'))                  t < T; of this layer, k_conv(y)
        V_t = V_t * gate(cell(mean of V_t, c'))          t < T; of this layer, v_conv(x)
        a   = softmax over t of q . K_t / sqrt(D) per head
        out = x + drop_path(relu(norm(sum_t a_t * V_t)))

    or, with ``gated="features"``, gates the features that K_t and V_t are made from instead. Fused,
    a stage of it has at most 64 layers.

    A spec is a preset:

    ============= ===================================== ======================================
    argument      ``spec="paper"``                      ``spec="official"``
    ============= ===================================== ======================================
    ``cell``      "dsu"                                 "dsu_split"
    ``gate``      "identity"                            "identity", or "sigmoid" under cells
                                                        whose output is not in (0, 1)
    ``prev_conv`` False                                 True
    ``prev_from`` "output": o of the layer before,      "shortcut": the block's input, passed
                  zero for the first                    as ``prev``
    ``gated``     "features"                            "projections"
    weights of    N(0, 2 / 9)                           N(0, 2 / (9 C))
    v_, prev_conv
    ============= ===================================== ======================================

    All other parameters start alike: q_conv and k_conv as torch.nn.Conv1d does, lam from N(0, 1),
    the cell as torch.nn.Linear does.

    ``cell="none"`` makes the static layers MRLA-L (p is the shortcut) and MRLA-B: no gate, no
    recurrent state.

    ``norm`` may be replaced by any module that maps [B, C, H, W] to the same (SyncBatchNorm,
    frozen statistics, ...): it then is called on its own, between fused kernels. A plain
    torch.nn.BatchNorm2d without hooks is part of the fused step, in every one of its modes.

    Args:
        channels: C of the features.
        variant: "light" or "base".
        spec: "paper" or "official", see above.
        cell: "dsu", "dsu_split", "dia", "lstm", "rnn" or "none"; None: the spec's.
        reduction: the cell's hidden width is C // reduction.
        head_dim: channels of a head; divides C, or is larger and lowered to C.
        drop_path: probability of dropping a sample's attention branch while training.
        norm: whether there is a batch norm.
        fused: run as one fused operation per direction; otherwise as plain PyTorch. Parameters,
            random numbers and (up to rounding) results are the same. May be changed at any time.
        gate: "identity" or "sigmoid", on the cell's output; None: the spec's.
        prev_conv: whether the depthwise convolution of p is added; None: the spec's. "light" only.
        context: "per_sample"; or "first_sample", a defect of the official code in which all gates
            of a batch read the context of its first sample: for checkpoints trained so.
        activation: of c inside "dsu": "sigmoid", "tanh", "relu" or "identity".
        initial_state: of the cell: "zeros", "normal" or "learned".
        eps, momentum: of the batch norm.
        shared: leave the cell and prev_conv to the owner of the layers (`DLAStage`), which passes
            them to every call.
        prev_from: "output" or "shortcut", where p comes from; None: the spec's. "light" only.
        gated: "projections" or "features", see above; None: the spec's. "base" only.

    The convolutions and the cell are never called: the layer reads their weights and nothing else.
    Of hooks on them those before the call run if the weight is no parameter, as they may be what
    makes it (``torch.nn.utils.prune``, ``weight_norm``); those of ``norm`` and ``drop_path`` run.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    _recalled: Recalled | None = None  # from the last call

    def __init__(
        self,
        channels: int,
        variant: str = "light",
        spec: str = "paper",
        *,
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
        gated: str | None = None,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.head_dim = min(positive_int("head_dim", head_dim), channels)
        if channels % self.head_dim:
            raise ValueError(
                f"head_dim: expected a divisor of channels={channels}, got {self.head_dim}; "
                f"head_dim={math.gcd(channels, self.head_dim)} is one"
            )
        self.variant, self.spec = variant, spec
        self.fused, self.shared = boolean("fused", fused), boolean("shared", shared)
        self.form = resolve_form(variant, spec, cell, gate, prev_conv, prev_from, gated)
        self.context = one_of("context", context, CONTEXTS)
        self.cell = self.prev_conv = None
        if not shared:
            self.cell, self.prev_conv = shared_parts(
                channels, self.form, spec, reduction, activation, initial_state
            )
        size = channel_kernel_size(channels)
        self.q_conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.k_conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.v_conv = DepthwiseConv(channels, spec)
        self.lam = nn.Parameter(torch.empty(channels)) if variant == "light" else None
        self.norm = batch_norm(channels, eps, momentum) if boolean("norm", norm) else None
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws lam, the layer's own parameter, anew; its modules reset theirs."""
        if self.lam is not None:
            nn.init.normal_(self.lam)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has modules of its own.
        return {name: value for name, value in vars(self).items() if name != "_recalled"}

    def extra_repr(self) -> str:
        choices = self.form._asdict().items()
        form = ", ".join(f"{name}={value!r}" for name, value in choices if value is not None)
        text = f"{self.channels}, {self.variant!r}, spec={self.spec!r}, {form}"
        text += f", head_dim={self.head_dim}"
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
        join: bool = False,
        branch_norm: nn.Module | None = None,
    ) -> tuple[Tensor, DLAState]:
        """One layer step.

        Args:
            x: [B, C, H, W], float32, float64, bfloat16 or float16, as the parameters are (under
                autocast: any); output of the layer's block.
            prev: p, like x. Default under ``prev_from="output"``: the output in ``state``. None
                under ``variant="base"``.
            state: what the layer before returned; None for the first layer of a stage.
            cell, prev_conv: the stage's, for a layer made with ``shared=True``. Of prev_conv, a
                depthwise convolution without bias, only the weight [C, 1, 3, 3] is read.
            keep_output: False if no later layer will read what this one adds to the state: it may
                then be left out of it, which spares writing it.
            join: x is the residual branch of the layer's block and ``prev`` its shortcut, not yet
                joined: relu(x + prev) takes x's place, formed where it is read. "light" only.
            branch_norm: the module that x has yet to pass before it is joined. A plain
                torch.nn.BatchNorm2d without hooks becomes part of the fused step.

        Returns:
            out like x, and the state for the next layer of the stage.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        choices = cell, prev_conv, keep_output, join, branch_norm
        compiling = torch.compiler.is_dynamo_compiling()
        recalled = None if compiling else self._recalled
        if recalled is not None:
            results = recalled.attend(self, x, prev, state, choices)
            if results is not None:
                return self._light_end(x, state, results, recalled.arguments)
        cell, prev_conv = self._parts(cell, prev_conv)
        v_weight = parameter(child(self, "v_conv"), "weight", None)
        self._check(x, prev, state, cell, v_weight, keep_output, join, branch_norm)
        state = self._start(x, cell) if state is None else state
        if self.variant == "base":
            return self._base_step(x, state, cell, v_weight, keep_output)
        prev = self._previous(x, prev, state)
        if join and not self._joins(branch_norm):
            x = join_parts(x, branch_norm, prev, self.fused)
            join, branch_norm = False, None
        arguments = self._light_arguments(
            x, prev, state, cell, prev_conv, v_weight, keep_output, join, branch_norm
        )
        results = self.attend(x, prev, state, arguments)
        if not compiling:
            self._recalled = recall(self, x, prev, cell, prev_conv, choices, arguments)
        return self._light_end(x, state, results, arguments)

    def _light_arguments(
        self,
        x: Tensor,
        prev: Tensor | None,
        state: DLAState,
        cell: Cell | None,
        prev_conv: nn.Conv2d | None,
        v_weight: Tensor,
        keep_output: bool,
        join: bool,
        branch_norm: nn.BatchNorm2d | None,
    ) -> LightArguments:
        keep_output = keep_output and self.form.prev_from == "output"
        dtype = state.context.dtype
        has_conv = prev_conv is not None and prev is not None
        branch = batch_norm_arguments(branch_norm, x, dtype)
        norm, drop_scale, finishes = self._finish(x, dtype)
        tensors = (
            *self._filters(v_weight, dtype),
            parameter(prev_conv, "weight", dtype) if has_conv else None,
            parameter(self, "lam", dtype),
            norm.weight,
            norm.bias,
            branch.weight,
            branch.bias,
            norm.mean,
            norm.var,
            branch.mean,
            branch.var,
            drop_scale,
        )
        flags = dict(
            **self._flags(cell),
            norm=norm.mode,
            eps=norm.eps,
            residual=finishes,
            join=join,
            branch_norm=branch.mode,
            branch_eps=branch.eps,
            return_o=keep_output and finishes,
        )
        cell_params = cell.weights(dtype) if cell else []
        gated = cell is not None and prev is not None
        return LightArguments(
            cell_params, tensors, flags, finishes, keep_output, gated, branch_norm
        )

    def attend(
        self, x: Tensor, prev: Tensor | None, state: DLAState, arguments: LightArguments
    ) -> tuple[Tensor, ...]:
        """The op's results. Has no effects."""
        cell_params, tensors, flags, *_ = arguments
        attend = (dla_kernels if self.fused else light_reference).light_attention
        return attend(x, prev, state.context, cell_params, *tensors, **flags)

    def _light_end(
        self, x: Tensor, state: DLAState, results: tuple[Tensor, ...], arguments: LightArguments
    ) -> tuple[Tensor, DLAState]:
        """What follows the op. Of two norms that are one module, the branch's comes first."""
        _, _, flags, finishes, keep_output, gated, branch_norm = arguments
        out, o, context, mean, var, branch_mean, branch_var, summary = results
        if flags["branch_norm"] == "batch":
            track_statistics(branch_norm, branch_mean, branch_var, x)
        if flags["norm"] == "batch":
            track_statistics(child(self, "norm"), mean, var, x)
        if not finishes:
            o, out = out, self._finished_by_modules(x, out)
        if recordings:
            scores, gates = summary[2:4]
            record(self, scores[:, :: self.head_dim], gates if gated else None)
        o = o if keep_output else None
        return out, DLAState(context, o, state.size, state.cell, state.stage)

    def _base_step(
        self, x: Tensor, state: DLAState, cell: Cell | None, v_weight: Tensor, keep_output: bool
    ) -> tuple[Tensor, DLAState]:
        attend = (dla_kernels if self.fused else base_reference).base_attention
        dtype = state.context.dtype
        cell_weights = cell.weights(dtype) if cell else []
        q_weight, k_weight, v_weight = self._filters(v_weight, dtype)
        norm, drop_scale, finishes = self._finish(x, dtype)
        out, v, context, keys, gates, own_mean, scores, mean, var, _ = attend(
            x,
            [match_autocast(value, x) for value in state.values],
            state.context,
            state.keys,
            state.gates,
            list(state.pooled),
            cell_weights,
            q_weight,
            k_weight,
            list(state.key_weights),
            v_weight,
            norm.weight,
            norm.bias,
            norm.mean,
            norm.var,
            drop_scale,
            **self._flags(cell),
            gated=self.form.gated,
            norm=norm.mode,
            eps=norm.eps,
            relu=finishes,
            residual=finishes,
            return_v=keep_output,
        )
        if not finishes:
            out = self._finished_by_modules(x, out)
        if norm.mode == "batch":
            track_statistics(child(self, "norm"), mean, var, x)
        if recordings:
            record(self, scores, gates if cell_weights else None)
        if not keep_output:
            return out, DLAState(context, None, state.size, state.cell, state.stage)
        static, features = self.form.cell == STATIC, self.form.gated == "features"
        return out, DLAState(
            context,
            None,
            state.size,
            state.cell,
            state.stage,
            values=(*state.values, v),
            keys=keys,
            gates=gates,
            pooled=() if static else (*state.pooled, own_mean),
            key_weights=(*state.key_weights, k_weight) if features else (),
        )

    def _filters(self, v_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of q_conv, k_conv and v_conv in ``dtype``."""
        q_weight = parameter(child(self, "q_conv"), "weight", dtype)
        k_weight = parameter(child(self, "k_conv"), "weight", dtype)
        return q_weight, k_weight, cast(v_weight, dtype)

    def _flags(self, cell: Cell | None) -> dict[str, Any]:
        """Of both ops."""
        return {
            "cell": self.form.cell,
            "activation": cell.activation if cell else "identity",
            "gate": self.form.gate,
            "context": self.context,
            "head_dim": self.head_dim,
        }

    def _finish(
        self, x: Tensor, dtype: torch.dtype
    ) -> tuple[BatchNormArguments, Tensor | None, bool]:
        """The norm and the factors of drop path for the op, and whether it goes on from o to the
        end; if not, there are none."""
        if not self._norm_and_drop_path_are_fused():
            return NO_NORM, None, False
        norm = batch_norm_arguments(child(self, "norm"), x, dtype)
        scale = child(self, "drop_path").scale(x)
        return norm, None if scale is None else scale.flatten(), True

    def _finished_by_modules(self, x: Tensor, o: Tensor) -> Tensor:
        branch = o if self.norm is None else self.norm(o)
        return x + self.drop_path(torch.relu(branch) if self.variant == "base" else branch)

    def _norm_and_drop_path_are_fused(self) -> bool:
        """Whether the op may stand for the modules: they do nothing that it would miss."""
        norm, drop_path = child(self, "norm"), child(self, "drop_path")
        known = norm is None or is_plain(norm)
        known = known and type(drop_path) is DropPath and is_unhooked(drop_path)
        return self.fused and known

    def _joins(self, branch_norm: nn.Module | None) -> bool:
        """Whether the op can form relu(branch_norm(x) + prev) where it reads it."""
        known = branch_norm is None or is_plain(branch_norm)
        return known and self._norm_and_drop_path_are_fused()

    def _start(self, x: Tensor, cell: Cell | None) -> DLAState:
        """The state before the first layer of a stage."""
        dtype = compute_dtype(x.dtype)
        none = torch.empty((0, *x.shape[:2]), dtype=dtype, device=x.device)
        context = none if cell is None else cell.initial_state(x.shape[0], dtype, x.device)
        memory = {"keys": none, "gates": none} if self.variant == "base" else {}
        stage = stage_of(child(self, "cell"), cell)
        return DLAState(context, None, (x.shape[2], x.shape[3]), self.form.cell, stage, **memory)

    def _check(
        self,
        x: Tensor,
        prev: Tensor | None,
        state: DLAState | None,
        cell: Cell | None,
        v_weight: Tensor,
        keep_output: bool,
        join: bool,
        branch_norm: nn.Module | None,
    ) -> None:
        """Raises if an argument does not fit."""
        check_features("x", x, self.channels, v_weight)
        one_of("context", self.context, CONTEXTS)
        boolean("keep_output", keep_output)
        boolean("join", join)
        if state is not None:
            self._check_state(x, prev, state, cell)
        if branch_norm is not None and not join:
            raise ValueError(f"branch_norm: expected None without join, got {branch_norm}")
        if self.variant == "base":
            if join:
                raise ValueError("join: expected False under variant='base', which has no p")
            if prev is not None:
                raise ValueError(
                    "prev: expected None under variant='base', which attends to the layers in "
                    f"state, got {describe(prev)}"
                )
            return
        if join and prev is None:
            raise ValueError("prev: expected the shortcut that x is joined with, got None")
        if prev is None and self.form.prev_from == "shortcut":
            raise ValueError(
                "prev: expected the shortcut of the block (its input, downsampled in a stage's "
                f"first block), {list(x.shape)}, got None; DLAStage passes it"
            )
        name = "prev" if prev is not None else "state.output"
        p = self._previous(x, prev, state)
        if p is not None:
            like(name, p, x.shape, x.dtype, x.device)

    def _check_state(
        self, x: Tensor, prev: Tensor | None, state: DLAState, cell: Cell | None
    ) -> None:
        stage = stage_of(child(self, "cell"), cell)
        check_state(state, cell, stage, x, compute_dtype(x.dtype))
        check_memory(state, self.variant, cell is None, self.form.gated)
        if not self.fused:
            check_tensors(state, x, self.form.gated)
        if prev is None and state.output is None and self.form.prev_from == "output":
            raise ValueError(
                "state: expected one with the output of the layer before, got one without: it is "
                "from another form of layer, or from a layer called with keep_output=False"
            )

    def _parts(
        self, cell: Cell | None, prev_conv: nn.Conv2d | None
    ) -> tuple[Cell | None, nn.Conv2d | None]:
        """The cell and prev_conv of this call: the layer's own, or those of its owner."""
        cell = child(self, "cell") if cell is None else cell
        prev_conv = child(self, "prev_conv") if prev_conv is None else prev_conv
        check_kind(cell, self.form.cell, self.channels)
        if prev_conv is not None and not isinstance(prev_conv, nn.Module):
            raise TypeError(f"prev_conv: expected a Conv2d or None, got {describe(prev_conv)}")
        if (prev_conv is not None) != bool(self.form.prev_conv):
            raise ValueError(
                f"prev_conv: this layer was made with prev_conv={self.form.prev_conv}, "
                f"got {type(prev_conv).__name__}; a layer made with shared=True takes it from its "
                "caller"
            )
        return cell, prev_conv

    def _previous(self, x: Tensor, prev: Tensor | None, state: DLAState | None) -> Tensor | None:
        """p of this step; None stands for zeros."""
        if prev is None and state is not None:
            prev = state.output
        return match_autocast(prev, x)


class MRLALayer(DLALayer):
    """MRLA, the static counterpart: no cell, no gate. p of MRLA-L is the shortcut, ``prev``.

    Args as of `DLALayer`; ``spec`` only sets the initialisation.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "light",
        spec: str = "paper",
        *,
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
            cell=STATIC,
            head_dim=head_dim,
            drop_path=drop_path,
            norm=norm,
            fused=fused,
            eps=eps,
            momentum=momentum,
        )
