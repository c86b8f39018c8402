"""PipelinedMoE: the routed experts of a model as a call, for callers who bring their own attention and router."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.errors import ConfigError, InputError, PipemoeError
from pipemoe.experts import check_finite, make_experts
from pipemoe.plan.schedule import ModelShape, Plan
from pipemoe.runtime.runtime import Runtime

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.world import World
    from pipemoe.experts import ExpertWeights
    from pipemoe.runtime.lanes import Event

_CHECK_SECONDS = 0.05  # how often a waiting caller looks whether the step has failed


class PipelinedMoE:
    """The MoE layers of a model, spread over the ranks of `world`.

    weights: this rank's experts, one entry per MoE layer (see `pipemoe.experts.local_range` for which experts are this rank's).
    num_experts, top_k: of the whole model. config: equal on all ranks. Raises on every rank what any of them finds wrong.
    """

    def __init__(self, world: World, weights: Sequence[ExpertWeights], *, num_experts: int, top_k: int, config: Config = Config()) -> None:
        error, experts, ranges = None, None, []
        try:
            for layer, layer_weights in enumerate(weights):
                layer_weights.validate(layer)
            check_finite(weights)
            ranges = [[w.first_expert, w.num_local_experts] for w in weights]
            if not weights:
                error = ConfigError(f"rank {world.rank}: no weights; pass one ExpertWeights per MoE layer")
        except PipemoeError as e:
            error = e
        except (AttributeError, TypeError) as e:
            error = InputError(f"rank {world.rank}: weights must be a sequence of ExpertWeights, one per MoE layer: {e}")
        world.agree(error, {}, "looking at the weights")
        _check_partition([json.loads(p) for p in world.all_gather(json.dumps(ranges).encode())], num_experts)
        hidden, self._dtype = weights[0].hidden, weights[0].row_dtype
        try:
            shape = ModelShape(hidden, weights[0].intermediate, num_experts, top_k, len(weights))
        except ConfigError as e:
            shape, error = None, e
        world.agree(error, {}, "looking at the model's shape")
        try:
            experts = make_experts(
                weights,
                top_k=top_k,
                hidden=hidden,
                device=world.device,
                dtype=self._dtype,
                implementation=config.experts,
                deterministic=config.deterministic,
                num_experts=num_experts,
                dispatch_dtype=config.torch_dispatch_dtype,
            )
        except PipemoeError as e:
            error = e
        self.runtime = Runtime(world, shape, config, experts, self._dtype, {}, error=error)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Routed experts of a one-layer model on this rank's tokens; every rank calls, also with no tokens.

        x: [T_r, H] in the weights' dtype, any T_r >= 0. topk_ids: [T_r, K] int32 or int64, 0 to E - 1. topk_weights: [T_r, K]
        floating, finite. Returns [T_r, H] in x's dtype. A wrong argument on one rank raises the same InputError on all of them.
        """
        if self.runtime.shape.num_layers != 1:
            raise ConfigError(f"a call is for one MoE layer, but this PipelinedMoE has {self.runtime.shape.num_layers}; use step()")
        error = None
        try:
            self._check(x, topk_ids, topk_weights, values=True)
        except InputError as e:
            error = e
        with Step(self, 0 if error else len(x), None, error) as step:
            return step(0, x, topk_ids, topk_weights)

    def step(self, num_tokens: int, lengths: Sequence[int] | None = None) -> Step:
        """One forward pass through all MoE layers: `with moe.step(T_r, lengths) as step: y = step(layer, x, ids, weights)`.

        Every rank enters one; `num_tokens` may be 0. lengths: this rank's sequences in tokens (default: one sequence).
        One step at a time: entering raises InputError while this thread is inside another step of the same world.
        """
        lengths = lengths if lengths is not None else ([num_tokens] if num_tokens else [])
        error = None
        if sum(lengths) != num_tokens:
            error = InputError(f"rank {self.runtime.world.rank}: lengths sum to {sum(lengths)}, but num_tokens is {num_tokens}")
        return Step(self, num_tokens, lengths, error)

    def _check(self, x: Any, ids: Any, weights: Any, values: bool) -> None:
        """Raise InputError unless the arguments of a call are usable; `values` also looks into ids and weights."""
        import torch

        world, shape = self.runtime.world, self.runtime.shape
        rank = f"rank {world.rank}: "

        def check(name: str, tensor: Any, wanted: tuple, dtypes: tuple) -> None:
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{rank}{name} is a {type(tensor).__name__}; it must be a tensor")
            if tuple(tensor.shape) != wanted:
                raise InputError(f"{rank}{name} has shape {tuple(tensor.shape)}; it must be {wanted}")
            if tensor.dtype not in dtypes:
                raise InputError(f"{rank}{name} is {tensor.dtype}; it must be {' or '.join(str(d) for d in dtypes)}")
            if tensor.device != world.device:
                raise InputError(f"{rank}{name} is on {tensor.device}; it must be on {world.device}")

        if isinstance(x, torch.Tensor) and x.ndim != 2:
            raise InputError(f"{rank}x has shape {tuple(x.shape)}; it must have 2 dimensions, [T, {shape.hidden}]")
        rows = x.shape[0] if isinstance(x, torch.Tensor) else 0
        check("x", x, (rows, shape.hidden), (self._dtype,))
        check("topk_ids", ids, (rows, shape.top_k), (torch.int32, torch.int64))
        check("topk_weights", weights, (rows, shape.top_k), (torch.float32, torch.bfloat16, torch.float16))
        if values and rows:
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= shape.num_experts:
                raise InputError(f"{rank}topk_ids holds {low if low < 0 else high}; ids go from 0 to {shape.num_experts - 1}")
            if not bool(torch.isfinite(weights).all()):
                raise InputError(f"{rank}topk_weights holds NaN or infinity; router weights must be finite")


def _check_partition(ranges_of: list[list[list[int]]], num_experts: int) -> None:
    """Raise InputError, the same on every rank, unless in each layer the ranks' experts are 0 to E - 1, each once.

    ranges_of: per rank and layer, first expert and number of experts.
    """
    for rank, ranges in enumerate(ranges_of):
        if len(ranges) != len(ranges_of[0]):
            raise InputError(f"rank {rank}: weights of {len(ranges)} MoE layers, but rank 0 has {len(ranges_of[0])}")
    for layer in range(len(ranges_of[0])):
        held = sorted(expert for ranges in ranges_of for expert in range(ranges[layer][0], sum(ranges[layer])))
        if held != list(range(num_experts)):
            found = ", ".join(f"rank {r} holds {of[layer][1]} from {of[layer][0]}" for r, of in enumerate(ranges_of))
            raise InputError(f"layer {layer}: the ranks must hold experts 0 to {num_experts - 1}, each once, but {found}")


class Step:
    """One forward pass of a PipelinedMoE; see `PipelinedMoE.step`."""

    def __init__(self, moe: PipelinedMoE, num_tokens: int, lengths: Sequence[int] | None, error: PipemoeError | None) -> None:
        self._moe, self._num_tokens, self._error = moe, num_tokens, error
        # The drop-in call knows no sequences and needs no causality: any cut will do.
        self._lengths = lengths if lengths is not None else ([num_tokens] if num_tokens else [])
        self._next_layer = 0
        self._source: _CallerSource | None = None

    def __enter__(self) -> Step:
        runtime = self._moe.runtime
        if self._source is not None:
            raise InputError(f"rank {runtime.world.rank}: this step has been entered before; make another one with step()")
        source = _CallerSource(runtime.shape.num_layers, runtime.world.engine.wake.set)
        self._future = runtime.submit_step(self._lengths, source, error=self._error)
        self._source, self._thread, inside = source, threading.get_ident(), runtime.world.threads_in_step
        inside.add(self._thread)
        try:
            self._wait(source.begun)
        except BaseException as error:  # __exit__ is not called then
            inside.discard(self._thread)
            source.abandon(error)
            raise
        return self

    def __call__(self, layer: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' sums [T_r, H] of MoE layer `layer`, in x's dtype; layers come in order, from 0.

        Arguments are checked as those of a PipelinedMoE's call; the values of ids and weights on a GPU only with Config.debug,
        since that waits for the device.
        """
        import torch

        moe = self._moe
        num_layers = moe.runtime.shape.num_layers
        if self._source is None:
            raise InputError(f"rank {moe.runtime.world.rank}: layer {layer} called outside of the step: enter it by `with` first")
        if self._next_layer == num_layers:
            raise InputError(f"rank {moe.runtime.world.rank}: layer {layer} called, but all {num_layers} layers of this step are done")
        if layer != self._next_layer:
            raise InputError(f"rank {moe.runtime.world.rank}: layer {layer} called; next is {self._next_layer} of {num_layers}")
        moe._check(x, topk_ids, topk_weights, values=moe.runtime.world.device.type == "cpu" or moe.runtime.config.debug)
        if len(x) != self._num_tokens:
            raise InputError(f"rank {moe.runtime.world.rank}: x has {len(x)} rows; this step was entered with {self._num_tokens}")
        self._next_layer += 1
        if not self._num_tokens:
            return torch.empty_like(x)
        y = torch.empty(x.shape, dtype=moe.runtime.results_dtype, device=x.device)
        self._source.give(layer, x.contiguous(), topk_ids.int(), topk_weights.float(), y)
        self._wait(self._source.issued[layer])
        for event in self._source.events[layer]:
            self._after(event)
        return y.to(x.dtype)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._moe.runtime.world.threads_in_step.discard(self._thread)
        unfinished = self._next_layer < self._moe.runtime.shape.num_layers and self._num_tokens > 0
        if error is None and unfinished:
            error = InputError(f"rank {self._moe.runtime.world.rank}: step left after {self._next_layer} of {self._moe.runtime.shape.num_layers} layers")
            self._source.abandon(error)
            self._future.exception()
            raise error
        if unfinished:
            self._source.abandon(error)  # the others still get this rank's part of the plan
            self._future.exception()
            return
        if error is not None and self._future.exception() is None:  # the engine has not seen it: tell the others at the next step
            self._moe.runtime.announce(error)
            return
        self._future.result()

    def _wait(self, flag: threading.Event) -> None:
        """Wait for the engine; raise what ended the step if it did."""
        while not flag.wait(_CHECK_SECONDS):
            if self._future.done() and not flag.is_set():
                self._future.result()

    def _after(self, event: Event) -> None:
        """Let the caller's next work see what comes before `event`: its stream waits, or on the host its thread."""
        import torch

        if self._moe.runtime.world.device.type == "cuda":
            torch.cuda.current_stream().wait_event(event.event)
            return
        while not event.wait(_CHECK_SECONDS):
            if self._future.done() and not event.done():
                self._future.result()


class _CallerSource:
    """Rows from the caller's layer calls; results into tensors that the calls return."""

    has_side_work = False

    def __init__(self, num_layers: int, wake: Callable[[], None]) -> None:
        """wake: tells the engine that there is something new for it."""
        self._wake = wake
        self.begun = threading.Event()
        self.issued = [threading.Event() for _ in range(num_layers)]
        self.events: list[list[Event]] = [[] for _ in range(num_layers)]
        self._inputs: list[tuple | None] = [None] * num_layers
        self._layer: dict[int, int] = {}  # per cohort
        self._error: BaseException | None = None
        self._due = 0

    def give(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, y: torch.Tensor) -> None:
        import torch

        event = None
        if x.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._inputs[layer] = (x, ids, weights, y, event)  # kept until the step is over: other streams read and write them
        self._wake()

    def abandon(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    def begin(self, plan: Plan, rank: int) -> None:
        self._due = sum(any(s.rank == rank for s in wave.segments) for cohort in plan.cohorts for wave in cohort.waves)
        self.begun.set()

    def ready(self, cohort: int, layer: int) -> bool:
        return self._inputs[layer] is not None or self._error is not None

    def attend(self, cohort: int, layer: int) -> None:
        import torch

        if self._inputs[layer] is None:
            raise self._error
        self._layer[cohort] = layer
        event = self._inputs[layer][4]
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, ids, weights, *_ = self._inputs[self._layer[cohort]]
        return x[start:stop], ids[start:stop], weights[start:stop]

    def side_work(self, cohort: int) -> None:
        pass

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        return self._inputs[self._layer[cohort]][3][start:stop]

    def combined(self, cohort: int, layer: int, event: Event) -> None:
        self.events[layer].append(event)
        if len(self.events[layer]) == self._due:
            self.issued[layer].set()

    def finish(self, cohort: int) -> None:
        pass

    def finished(self, cohort: int, seconds: float) -> None:
        pass
