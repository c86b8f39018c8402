"""The experts call: rows in, this rank's partial sums out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipemoe.errors import ConfigError, InputError
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import ScatteredRows

if TYPE_CHECKING:
    import torch

    from pipemoe.wire import WireRows

COMBINE_DTYPES = ("float32", "bfloat16", "float16")
DETERMINISTIC_DTYPE = "float64"


class Scratch(Protocol):
    """Memory of one cohort slot; allocated once, used by one call at a time."""

    max_rows: int
    num_bytes: int  # all that a call takes
    transient_bytes: int  # of these, what a call allocates and frees by itself


class Experts(Protocol):
    """All layers' local experts on one device."""

    implementation: str
    deterministic: bool
    wire_dtype: torch.dtype  # of the rows' hidden values: float8_e4m3fn with scales, or the format of the computation
    num_sms: int  # multiprocessors that persistent kernels fill; 0: there are no such kernels
    only_launches: bool  # is a call nothing but launches of pipemoe_kernels?

    def with_free_sms(self, num_sms: int) -> Experts:
        """These experts with kernels that leave `num_sms` multiprocessors to collectives. Scratches serve both."""

    def new_scratch(self, max_rows: int) -> Scratch:
        """Allocate what calls with up to `max_rows` rows need."""

    def warm_up(self, scratch: Scratch) -> None:
        """Compile, load and run everything once, so that no later call with this scratch compiles or loads a module."""

    def __call__(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: Scratch) -> None:
        """out[i] = sum of weights[i, k] * (expert ids[i, k] of x_i), over k with a local expert, ascending.

        rows: n <= scratch.max_rows wire rows. out [n, H] with adjacent columns, every row written: float32, bfloat16 or
        float16, or float64 (on the grid of 2^-32) when deterministic. Raises InputError for other shapes or dtypes.
        """

    def most_few_rows(self, layer: int) -> int:
        """Up to how many rows `on_few_rows` serves a layer; 0: none."""

    def on_few_rows(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: Any) -> None:
        """As a call, by kernels for few rows, whose sums have other bits; only launches."""


class ExpertsShape:
    """What every implementation checks: the layers' shapes at construction, rows and out at each call."""

    num_sms = 0
    only_launches = False

    def __init__(
        self,
        weights: Sequence[ExpertWeights],
        *,
        top_k: int,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype,
        deterministic: bool,
    ):
        import torch

        if top_k < 1 or hidden < 1:
            raise ConfigError(f"top_k is {top_k} and hidden is {hidden}; both must be at least 1")
        for layer, layer_weights in enumerate(weights):
            layer_weights.validate(layer)
            if layer_weights.hidden != hidden:
                raise InputError(
                    f"layer {layer}: the weights are for hidden {layer_weights.hidden}; {hidden} is wanted"
                )
            if layer_weights.row_dtype != dtype:
                raise InputError(
                    f"layer {layer}: the weights are {layer_weights.dtype}; {dtype} is wanted, convert them"
                )
            if layer_weights.gate_up.device.type != device.type:
                raise InputError(
                    f"layer {layer}: the weights are on {layer_weights.gate_up.device}; move them to {device}"
                )
        self.weights = tuple(weights)
        self.top_k = top_k
        self.hidden = hidden
        self.device = device
        self.dtype = self.wire_dtype = dtype
        self.deterministic = deterministic
        self.max_intermediate = max((w.intermediate for w in weights), default=0)
        self.max_local_experts = max((w.num_local_experts for w in weights), default=0)
        names = (DETERMINISTIC_DTYPE,) if deterministic else COMBINE_DTYPES
        self.out_dtypes = tuple(getattr(torch, name) for name in names)

    def with_free_sms(self, num_sms: int) -> Self:
        """These experts with kernels that leave `num_sms` multiprocessors to collectives beside them. Without
        persistent kernels, as here, the same object: only in those would a block wait for its place, and all others for
        it.
        """
        return self

    def max_pairs(self, max_rows: int) -> int:
        """Most local pairs of `max_rows` rows. A row may name one expert several times, so only K bounds them."""
        return max_rows * self.top_k if self.max_local_experts else 0

    def most_few_rows(self, layer: int) -> int:
        return 0

    def on_few_rows(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: Any) -> None:
        raise NotImplementedError

    def check_max_rows(self, max_rows: int) -> None:
        if max_rows < 0:
            raise ConfigError(f"max_rows is {max_rows}; it must be 0 or more")

    def check_call(self, layer: int, rows: WireRows | ScatteredRows, out: torch.Tensor, max_rows: int) -> None:
        """Raise InputError unless the call fits the layer, the scratch and this object's dtypes."""
        num_rows = len(rows)
        if not 0 <= layer < len(self.weights):
            raise InputError(f"layer {layer} does not exist: there are {len(self.weights)} MoE layers")
        if num_rows > max_rows:
            raise InputError(f"layer {layer}: {num_rows} rows do not fit a scratch made for {max_rows}; make it larger")
        checked = isinstance(rows, ScatteredRows) and rows.checked_by is self  # the same pieces come layer after layer
        for _, piece in rows.pieces if not checked else ():
            self._check_rows(layer, piece)
        if isinstance(rows, ScatteredRows):
            rows.checked_by = self
        wanted = (num_rows, self.hidden)
        if out.shape != wanted or out.dtype not in self.out_dtypes or (num_rows and out.stride(1) != 1):
            raise InputError(
                f"layer {layer}: out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; {wanted} with "
                f"adjacent columns is wanted, in one of {self.out_dtypes} (deterministic={self.deterministic})"
            )
        if out.device.type != self.device.type:
            raise InputError(f"layer {layer}: a tensor is on {out.device}; the experts are on {self.device}")

    def _check_rows(self, layer: int, rows: WireRows) -> None:
        num_rows = len(rows)
        if rows.hidden.dtype != self.wire_dtype or rows.hidden.shape != (num_rows, self.hidden):
            raise InputError(
                f"layer {layer}: rows.hidden is {rows.hidden.dtype} {tuple(rows.hidden.shape)}; "
                f"{self.wire_dtype} {(num_rows, self.hidden)} is wanted"
            )
        if rows.ids.shape != (num_rows, self.top_k):
            raise InputError(f"layer {layer}: rows.ids is {tuple(rows.ids.shape)}; {(num_rows, self.top_k)} is wanted")
        if rows.buffer.device.type != self.device.type:
            raise InputError(f"layer {layer}: a tensor is on {rows.buffer.device}; the experts are on {self.device}")
