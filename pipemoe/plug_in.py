"""A transformers model with pipemoe's experts: its own forward, cache and generate stay, its routed experts are spread
over the ranks.

    every rank:  model.generate(its own prompts) -> attention, router -> experts module -> a step of PipelinedMoE
    no prompts, or done earlier than others:        `with` statement's end -> empty steps until all ranks are there

A forward of the model is one step of a PipelinedMoE: it begins at the first experts module and ends behind the last.
Every rank takes part in every step, since its experts are needed. So each rank runs the model inside of a `with`
statement on what from_transformers returns; a rank that gets to its end serves the others until all have.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look
from pipemoe.config import Config
from pipemoe.errors import ConfigError, InputError, ModelError, PipemoeError, describe
from pipemoe.experts import local_range
from pipemoe.layer import PipelinedMoE, Step
from pipemoe.world.world import world_of

if TYPE_CHECKING:
    import torch

    from pipemoe.models.experts_form import ExpertsSite
    from pipemoe.world.world import World


def from_transformers(model: Any, world: World, config: Config = Config()) -> PluggedExperts:
    """Spread the routed experts of a transformers model over the ranks, in place. Every rank calls.

    model: the same PreTrainedModel on every rank, on world.device, in any dtype that experts take, whose experts have
    the form that pipemoe.models.experts_form describes. This rank's experts stay; the others are freed. Inference only:
    call the model under torch.inference_mode() or torch.no_grad() (generate does).

        experts = pipemoe.from_transformers(model, world)
        with experts:  # ends when every rank has got here; no prompts on this rank: `pass`
            tokens = model.generate(**inputs)

    Rows of a forward (batch times sequence) are at most config.max_tokens_per_rank. Raises, on every rank, InputError
    if the model has no experts, or some of another form; what was looked for and what is there is named.
    """
    import torch

    from pipemoe.models.find_experts import find_experts

    world, error = world_of(world)

    def look_at() -> list[ExpertsSite]:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"rank {world.rank}: model is a {type(model).__name__}; it must be a transformers model")
        return find_experts(model)

    sites, wrong = look(world.rank, "the model", look_at, InputError)
    error = error or wrong
    agreed = {} if sites is None else {"the experts": str([(s.name, s.num_experts, s.top_k, s.hidden) for s in sites])}
    world.agree(error, agreed, "looking at the model's experts")
    assert sites is not None  # or `agree` has raised
    own = local_range(sites[0].num_experts, world.size, world.rank)
    weights = [site.take_weights(own) for site in sites]
    moe = PipelinedMoE(world, weights, num_experts=sites[0].num_experts, top_k=sites[0].top_k, config=config)
    return PluggedExperts(model, sites, moe)


class PluggedExperts:
    """The routed experts of a transformers model, on all ranks; a context manager, see from_transformers."""

    def __init__(self, model: torch.nn.Module, sites: list[ExpertsSite], moe: PipelinedMoE) -> None:
        from transformers.integrations.moe import ExpertsInterface

        from pipemoe.models.experts_form import IMPLEMENTATION, usual_forward

        self.moe = moe
        self._names = [site.name for site in sites]
        self._step: Step | None = None
        self._layer = 0  # that is called next
        for layer, site in enumerate(sites):
            site.replace_forward(partial(self._run, layer))
        ExpertsInterface.register(IMPLEMENTATION, usual_forward)
        root = model.get_submodule(_common_parent(model, self._names))
        root.register_forward_pre_hook(lambda *_: self._leave_broken_step())
        root.register_forward_hook(lambda *_: self._leave_broken_step(), always_call=True)

    def __enter__(self) -> PluggedExperts:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._leave_broken_step()
        if error is None:
            self.serve_until_all_done()
        elif isinstance(error, Exception) and not getattr(error, "is_shared", False):
            rank = self.moe.runtime.world.rank
            with contextlib.suppress(PipemoeError):  # the others wait in a step, which this one ends
                self._enter(0, ModelError(f"rank {rank}: model code raised {describe(error)}"))

    def serve_until_all_done(self) -> None:
        """Compute this rank's experts for the other ranks' forwards, until every rank has called this.

        Raises ModelError, as all ranks do, if one of them left its `with` statement by an exception.
        """
        while not self._all_done(self._enter(0), serves=True):
            pass

    def _enter(self, num_tokens: int, error: PipemoeError | None = None) -> Step:
        step = Step(self.moe, num_tokens, (num_tokens,) if num_tokens else (), error)
        step.__enter__()
        self._step, self._layer = step, 0
        return step

    def _leave(self) -> None:
        step, self._step = self._step, None
        assert step is not None
        step.__exit__(None, None, None)

    def _all_done(self, step: Step, serves: bool) -> bool:
        """Ends a step of no tokens here. If no rank has any, the ranks tell one another who only serves."""
        self._leave()
        if not step.is_empty:
            return False
        return all(told == b"serves" for told in self.moe.runtime.world.all_gather(b"serves" if serves else b"runs"))

    def _leave_broken_step(self) -> None:
        """End a step whose forward was left between its experts, mostly by an exception, which is then under way."""
        step, self._step = self._step, None
        if step is not None:
            where = f"rank {self.moe.runtime.world.rank}: the model's forward"
            error = sys.exc_info()[1] or InputError(f"{where} was left before {self._names[self._layer]}")
            step.__exit__(type(error), error, None)

    def _run(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Experts of one MoE layer: x [T, H], ids [T, K], weights [T, K] -> [T, H]."""
        import torch

        rank = self.moe.runtime.world.rank

        def look_at() -> None:
            if torch.is_grad_enabled() and x.requires_grad:
                raise InputError(
                    f"rank {rank}: experts here have no gradients; call the model under torch.inference_mode() or "
                    "torch.no_grad()"
                )
            if layer != self._layer or (layer == 0) != (self._step is None):
                raise ConfigError(
                    f"rank {rank}: {self._names[layer]} was called where {self._names[self._layer]} is next; a model "
                    "must call each of its experts once in a forward, in the order of its layers"
                )

        if self._step is None:
            self._layer = 0
        _, error = look(rank, "the call of an experts module", look_at)
        if layer == 0 and self._step is None:
            self._enter(len(x), error)
        elif error is not None:
            raise error
        step = self._step
        assert step is not None  # entered, or an error was raised
        y = step(layer, x, ids, weights.to(torch.float32))
        self._layer = layer + 1
        if self._layer == len(self._names):
            self._layer = 0
            if len(x):
                self._leave()
            else:
                self._all_done(step, serves=False)
        return y


def _common_parent(model: torch.nn.Module, names: list[str]) -> str:
    """The innermost module with a forward of its own that holds all of these."""
    import torch

    parts = [name.split(".") for name in names]
    depth = 0
    while depth < min(map(len, parts)) - 1 and len({tuple(p[: depth + 1]) for p in parts}) == 1:
        depth += 1
    parent = parts[0][:depth]
    while parent and isinstance(model.get_submodule(".".join(parent)), torch.nn.ModuleList):
        parent.pop()
    return ".".join(parent)
