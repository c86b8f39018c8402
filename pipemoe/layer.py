"""PipelinedMoE: the routed experts of a model as a call, for callers who bring their own attention and router."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look, shown, step_lengths, whole_number
from pipemoe.comm.exchange import shared
from pipemoe.config import Config, check_config
from pipemoe.errors import ConfigError, InputError, PipemoeError
from pipemoe.experts import check_finite, make_experts
from pipemoe.plan.schedule import ModelShape
from pipemoe.runtime.caller_source import CallerSource
from pipemoe.runtime.lanes import HostEvent
from pipemoe.runtime.runtime import Runtime
from pipemoe.runtime.source import SourceTraits
from pipemoe.runtime.stream_lanes import StreamEvent
from pipemoe.torch_state import plain_tensors, undisturbed
from pipemoe.world.world import world_of

if TYPE_CHECKING:
    import torch

    from pipemoe.experts import ExpertWeights
    from pipemoe.runtime.lanes import Event
    from pipemoe.world.world import World

_CHECK_SECONDS = 0.05  # how often a waiting caller looks whether the step has failed


class PipelinedMoE:
    """The MoE layers of a model, spread over the ranks of `world`.

    weights: this rank's experts, one entry per MoE layer; `pipemoe.experts.local_range` says which experts are this
    rank's. num_experts, top_k: of the whole model. config: equal on all ranks. An error of any rank is raised on all.
    """

    def __init__(
        self, world: World, weights: Sequence[ExpertWeights], *, num_experts: int, top_k: int, config: Config = Config()
    ) -> None:
        world, error = world_of(world)
        with undisturbed():
            found, wrong = look(
                world.rank,
                "arguments of PipelinedMoE",
                lambda: _look_at_model(world, weights, num_experts, top_k, config),
            )
            world.agree(
                error or wrong,
                {} if found is None else {"num_experts": str(found[1].num_experts)},
                "looking at the weights",
            )
            assert found is not None  # or `agree` has raised
            weights, shape, self._dtype, ranges = found
            _check_partition([json.loads(p) for p in world.all_gather(json.dumps(ranges).encode())], shape.num_experts)
            experts, error = look(
                world.rank,
                "making the experts",
                lambda: make_experts(
                    weights,
                    top_k=shape.top_k,
                    hidden=shape.hidden,
                    device=world.device,
                    dtype=self._dtype,
                    implementation=config.experts,
                    deterministic=config.deterministic,
                    num_experts=shape.num_experts,
                    dispatch_dtype=config.torch_dispatch_dtype,
                ),
                ConfigError,
            )
            traits = SourceTraits(hands_out_results=True)
            self.runtime = Runtime(world, shape, config, experts, self._dtype, traits, error=error)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Routed experts of a one-layer model on this rank's tokens; every rank calls, also with no tokens.

        x: [T_r, H] in the weights' dtype, any T_r >= 0. topk_ids: [T_r, K] int32 or int64, 0 to E - 1, or -1 for
        no expert. topk_weights: [T_r, K] floating, finite. Returns [T_r, H] in x's dtype. A wrong argument on one rank
        raises the same InputError on all of them.
        """
        rank = self.runtime.world.rank

        def look_at() -> int:
            if self.runtime.shape.num_layers != 1:
                raise ConfigError(
                    f"rank {rank}: a call is for one MoE layer, but this PipelinedMoE has "
                    f"{self.runtime.shape.num_layers}; use step()"
                )
            self._check(x, topk_ids, topk_weights, values=True)
            return len(x)

        num_tokens, error = look(rank, "arguments of a call", look_at)
        # The call knows of no sequences and needs no causality, so any cut will do.
        with Step(self, num_tokens or 0, (num_tokens,) if num_tokens else (), error) as step:
            return step(0, x, topk_ids, topk_weights)

    def step(self, num_tokens: int, lengths: Sequence[int] | None = None) -> Step:
        """One forward pass through all MoE layers: `with moe.step(T_r, lengths) as step: y = step(layer, x, ids,
        weights)`.

        Every rank enters one; `num_tokens` may be 0. lengths: this rank's sequences in tokens (default: one sequence).
        Wrong arguments on one rank raise the same InputError on all of them, when the step is entered.
        One step at a time: entering raises InputError while this thread is inside another step of the same world.

        On a GPU, do not copy into pageable host memory inside the step (`y.cpu()`, `y.tolist()`) before the stream has
        come so far (`torch.cuda.current_stream().synchronize()`). Such a copy holds the CUDA driver while it waits for
        rows that come from other ranks. If all ranks do so, no conductor can send what they wait for until the watchdog
        ends the job.
        """
        rank, most = self.runtime.world.rank, self.runtime.config.max_tokens_per_rank

        def look_at() -> tuple[int, tuple[int, ...]]:
            tokens = whole_number(f"rank {rank}: num_tokens", num_tokens, 0)
            found = step_lengths(rank, ([tokens] if tokens else []) if lengths is None else lengths, most)
            if sum(found) != tokens:
                raise InputError(f"rank {rank}: lengths sum to {sum(found)}, but num_tokens is {tokens}")
            return tokens, found

        found, error = look(rank, "arguments of step", look_at)
        return Step(self, *(found or (0, ())), error)

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
            if tensor.layout is not torch.strided:
                raise InputError(f"{rank}{name} has layout {tensor.layout}; it must be a dense tensor (torch.strided)")

        if isinstance(x, torch.Tensor) and x.ndim != 2:
            raise InputError(f"{rank}x has shape {tuple(x.shape)}; it must have 2 dimensions, [T, {shape.hidden}]")
        rows = x.shape[0] if isinstance(x, torch.Tensor) else 0
        check("x", x, (rows, shape.hidden), (self._dtype,))
        check("topk_ids", ids, (rows, shape.top_k), (torch.int32, torch.int64))
        check("topk_weights", weights, (rows, shape.top_k), (torch.float32, torch.bfloat16, torch.float16))
        if values and rows:
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < -1 or high >= shape.num_experts:
                raise InputError(
                    f"{rank}topk_ids holds {low if low < -1 else high}; ids go from 0 to {shape.num_experts - 1}, and "
                    "-1 means no expert"
                )
            if not bool(torch.isfinite(weights).all()):
                raise InputError(f"{rank}topk_weights holds NaN or infinity; router weights must be finite")


def _look_at_model(
    world: World, weights: Any, num_experts: Any, top_k: Any, config: Any
) -> tuple[list[ExpertWeights], ModelShape, torch.dtype, list[list[int]]]:
    """This rank's weights, one per MoE layer; the model's shape; the rows' dtype; each layer's first expert and number
    of experts. Raises if any of them, or the configuration, is wrong.
    """
    from pipemoe.experts import ExpertWeights

    rank = f"rank {world.rank}: "
    check_config(config, rank)
    wanted = f"{rank}weights must be a sequence of ExpertWeights, one per MoE layer"
    if not isinstance(weights, Iterable):
        raise InputError(f"{wanted}, but is a {type(weights).__name__}")
    layers = []
    for layer, of_layer in enumerate(weights):
        if not isinstance(of_layer, ExpertWeights):
            raise InputError(f"{wanted}, but layer {layer} is a {type(of_layer).__name__}")
        of_layer.validate(layer)
        if of_layer.gate_up.device.type != world.device.type:
            raise InputError(
                f"{rank}layer {layer}: the weights are on {of_layer.gate_up.device}; move them to {world.device}"
            )
        layers.append(of_layer)
    if not layers:
        raise ConfigError(f"{rank}no weights; pass one ExpertWeights per MoE layer")
    check_finite(layers)
    # raises for what is no number
    ModelShape(layers[0].hidden, layers[0].intermediate, num_experts, top_k, len(layers))
    shape = ModelShape(layers[0].hidden, layers[0].intermediate, int(num_experts), int(top_k), len(layers))
    return layers, shape, layers[0].row_dtype, [[int(w.first_expert), int(w.num_local_experts)] for w in layers]


def _check_partition(ranges_of: list[list[list[int]]], num_experts: int) -> None:
    """Raise a shared InputError unless in each layer the ranks' experts are 0 to E - 1, each once.

    ranges_of: per rank and layer, first expert and number of experts.
    """
    for rank, ranges in enumerate(ranges_of):
        if len(ranges) != len(ranges_of[0]):
            text = f"rank {rank}: weights of {len(ranges)} MoE layers, but rank 0 has {len(ranges_of[0])}"
            raise shared(InputError(text))
    for layer in range(len(ranges_of[0])):
        held = sorted(expert for ranges in ranges_of for expert in range(ranges[layer][0], sum(ranges[layer])))
        if len(held) != num_experts or held != list(range(num_experts)):
            found = ", ".join(f"rank {r} holds {of[layer][1]} from {of[layer][0]}" for r, of in enumerate(ranges_of))
            text = f"layer {layer}: the ranks must hold experts 0 to {num_experts - 1}, each once, but {found}"
            raise shared(InputError(text))


class Step:
    """One forward pass of a PipelinedMoE; see `PipelinedMoE.step`."""

    def __init__(
        self, moe: PipelinedMoE, num_tokens: int, lengths: tuple[int, ...], error: PipemoeError | None
    ) -> None:
        self._moe, self._num_tokens, self._lengths, self._error = moe, num_tokens, lengths, error
        self._given = self._done = 0  # layers
        self._source: CallerSource | None = None
        self._left = False

    @property
    def is_empty(self) -> bool:
        """Has no rank any tokens in this step? Known once it is entered."""
        return self._source is not None and self._source.is_empty

    def __enter__(self) -> Step:
        runtime = self._moe.runtime
        if self._source is not None:
            raise InputError(
                f"rank {runtime.world.rank}: this step has been entered before; make another one with step()"
            )
        source = CallerSource(runtime.shape.num_layers, runtime.world.conductor.wake.set, runtime.world.lanes.new_mark)
        self._future = runtime.submit_step(self._lengths, source, error=self._error)
        self._source, self._thread = source, runtime.world.enter_step()
        try:
            self._wait(source.begun)
        except BaseException as error:  # __exit__ is not called then
            runtime.world.leave_step(self._thread)
            source.abandon(error)
            raise
        return self

    def __call__(self, layer: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' sums [T_r, H] of MoE layer `layer`, in x's dtype. Layers come in order, from 0.

        Arguments are checked as in a PipelinedMoE's call. On a GPU, the values of ids and weights are only checked with
        Config.debug, since that waits for the device.
        """
        import torch

        runtime = self._moe.runtime
        _, error = look(
            runtime.world.rank, "arguments of a layer's call", lambda: self._check(layer, x, topk_ids, topk_weights)
        )
        if error is not None:
            raise error
        source = self._source
        assert source is not None  # the step has been entered
        with plain_tensors():
            if not self._num_tokens:
                self._done += 1
                return torch.empty(x.shape, dtype=x.dtype, device=x.device)
            # Allocate everything before the conductor gets the call. If this fails, the layer can be called again.
            sums = torch.empty(x.shape, dtype=runtime.results_dtype, device=x.device)
            y = sums if sums.dtype == x.dtype else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            # Kernels read the last dimension as it lies in memory.
            ids, weights = topk_ids.detach().int().contiguous(), topk_weights.detach().float().contiguous()
            source.give(self._done, x.detach().contiguous(), ids, weights, sums)
            self._given += 1
            self._wait(source.issued[self._done])
            for event in source.events[self._done]:
                self._after(event)
            source.forget(self._done)
            if y is not sums:
                y.copy_(sums)
        self._done += 1
        return y

    def _check(self, layer: Any, x: Any, topk_ids: Any, topk_weights: Any) -> None:
        """Raise InputError unless this is the next layer's call, with usable arguments."""
        moe, num_layers = self._moe, self._moe.runtime.shape.num_layers
        world = moe.runtime.world
        rank = f"rank {world.rank}: "
        if self._source is None:
            raise InputError(f"{rank}layer {shown(layer)} called outside of the step: enter it by `with` first")
        if self._left:
            raise InputError(
                f"{rank}layer {shown(layer)} called, but this step has been left; make another one with step()"
            )
        if self._done == num_layers:
            raise InputError(f"{rank}layer {shown(layer)} called, but all {num_layers} layers of this step are done")
        if whole_number(f"{rank}layer", layer, 0) != self._done:
            raise InputError(f"{rank}layer {layer} called; next is {self._done} of {num_layers}")
        if self._given > self._done:
            raise InputError(
                f"{rank}layer {layer} called again, but its first call was broken off under way; leave the step"
            )
        moe._check(x, topk_ids, topk_weights, values=world.device.type == "cpu" or moe.runtime.config.debug)
        if len(x) != self._num_tokens:
            raise InputError(f"{rank}x has {len(x)} rows; this step was entered with {self._num_tokens}")

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        runtime = self._moe.runtime
        runtime.world.leave_step(self._thread)
        source = self._source
        assert source is not None
        self._left = True
        num_layers, left_early = runtime.shape.num_layers, None
        if error is None and self._done < num_layers and self._num_tokens:
            error = left_early = InputError(
                f"rank {runtime.world.rank}: step left after {self._done} of {num_layers} layers"
            )
        if error is not None:
            source.abandon(error)  # the others still get this rank's part of the plan
        _, seen = self._end()
        source.forget_all()
        if error is None and seen is not None:
            raise seen
        if error is not None and seen is None:  # the conductor has not met it: tell the others at the next step
            runtime.announce(error)
        if left_early is not None:
            raise left_early

    def _end(self) -> tuple[Any, BaseException | None]:
        """Wait for the end of this rank's part: its time, or the error that ended it."""
        try:
            return self._moe.runtime.result_of(self._future), None
        except PipemoeError as error:
            return None, error

    def _wait(self, flag: threading.Event) -> None:
        """Wait for the conductor; raise what ended the step if it did."""
        while not flag.wait(_CHECK_SECONDS):
            self._check_that_it_goes_on(flag.is_set)

    def _after(self, event: Event) -> None:
        """Put the caller's next work after `event`: its stream waits, or on the host its thread."""
        import torch

        if isinstance(event, StreamEvent):
            event.let_wait(torch.cuda.current_stream().cuda_stream)
            return
        assert isinstance(event, HostEvent)
        while not event.wait(_CHECK_SECONDS):
            self._check_that_it_goes_on(event.done)

    def _check_that_it_goes_on(self, come: Callable[[], bool]) -> None:
        """Watch the conductor, and raise if the step has ended, so that the wait would never end."""
        world = self._moe.runtime.world
        world.conductor.watch()
        if self._future.done() and not come():
            self._future.result()
            raise InputError(
                f"rank {world.rank}: the step has ended while layer {self._done} was under way: it was left on "
                "another thread"
            )
