"""A server of benchmarks/forward.py (see case_server.py): prefill by pipemoe, this one or the one in another folder.

    python benchmarks/pipemoe_server.py --tree FOLDER --model config.json --max-tokens 8192

With a launcher before it, every rank prefills a prompt, of as many tokens as the case says for it, or none.
An older pipemoe, whose random routers send most tokens to a few experts, draws its weights by this checkout's
random_parameters, so that all implementations route alike.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipemoe import Model, World

CHECKOUT = Path(__file__).resolve().parents[1]
WATCHDOG_SECONDS = 900.0
FIGURE_STEPS = 5  # timed steps for the host's time of issuing


def module_from(file: Path, name: str) -> ModuleType:
    """The module in `file` under `name`, whatever the import path has under that name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Prefill by pipemoe, asked over pipes.")
    parser.add_argument("--tree", type=Path, default=CHECKOUT, help="the pipemoe to run (default: this one)")
    parser.add_argument("--model", type=Path, required=True, help="a config.json")
    parser.add_argument("--max-tokens", type=int, required=True, help="of a rank's longest prompt")
    parser.add_argument("--moe-max-num-tokens", type=int, help="of a wave (default: those of all ranks)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), required=True)
    parser.add_argument("--mode", default="broadcast")
    parser.add_argument("--cost", help="measured costs (pipemoe tune)")
    parser.add_argument("--attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--router-skew", type=float, default=0.0)
    return parser.parse_args()


class PipemoeServer:
    """One rank: rank 0 is asked, and tells the others."""

    def __init__(self, world: World, model: Model, options: argparse.Namespace, prompt: Any, counted: Any) -> None:
        self._world, self._model, self._seed = world, model, options.seed
        self._prompt, self._counted = prompt, counted

    def answer_to(self, request: dict[str, Any]) -> dict[str, Any]:
        """On rank 0."""
        return self._do(self._told(request))

    def follow(self) -> None:
        """On every other rank, until rank 0 has no more requests."""
        while (request := self._told(None)) is not None:
            self._do(request)

    def end(self) -> None:
        """On rank 0: let the other ranks go."""
        self._told(None)

    def _told(self, request: dict[str, Any] | None) -> Any:
        return json.loads(self._world.all_gather(json.dumps(request).encode(), "a request")[0])

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._figures(request) if request.get("figures") else self._rounds(request)

    def _prompts(self, request: dict[str, Any], number: int) -> list[Any]:
        """This rank's prompt number `number`, if it has one."""
        import torch

        rank, vocab_size = self._world.rank, self._model.decoder.vocab_size
        ids = self._prompt(self._seed, request["rank_tokens"][rank], number, rank, vocab_size)
        return [torch.tensor(ids, device="cpu")] if ids else []

    def _rounds(self, request: dict[str, Any]) -> dict[str, Any]:
        """Times of `rounds` prompts, from number `first` on; before them those numbered below 0, to warm up."""
        import torch

        times, tokens, issue_us = [], [], []
        first, warm_up, on_gpu = request["first"], request["warm_up"], self._world.device.type == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for number in [*range(-warm_up, 0), *range(first, first + request["rounds"])]:
            prompts = self._prompts(request, number)
            time.sleep(request["gap_s"])
            self._world.all_gather(b"", "start of a round")
            issued, begin = self._issued(), time.perf_counter()
            found = self._model.prefill(prompts)
            seconds = time.perf_counter() - begin
            self._world.all_gather(b"", "end of a round")  # on every rank
            if number >= 0:
                times.append(seconds * 1e3 if prompts else None)
                tokens.append(found.first_tokens[0] if prompts else None)
                if issued is not None:
                    spent, layers = (after - before for after, before in zip(self._issued(), issued))
                    issue_us.append(spent * 1e6 / layers)
        peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        mine = json.dumps([times, tokens, peak_bytes]).encode()
        ranks = [json.loads(payload) for payload in self._world.all_gather(mine, "times of the rounds")]
        return {
            "rank_ttft_ms": [list(of_ranks) for of_ranks in zip(*(times for times, _, _ in ranks))],
            "first_tokens": [list(of_ranks) for of_ranks in zip(*(tokens for _, tokens, _ in ranks))],
            "issue_us": issue_us,
            "peak_bytes": max(peak for _, _, peak in ranks) if on_gpu else None,
        }

    def _issued(self) -> tuple[float, int] | None:
        """Seconds of issuing and layers of cohorts so far; None in an older tree, which does not count."""
        return getattr(self._model.runtime, "issued", None)

    def _figures(self, request: dict[str, Any]) -> dict[str, Any]:
        """Outside the timing: how the case's tokens spread over the experts, and in older trees, by steps whose every
        operation is timed, the host's time of issuing a layer of a cohort, median over layers.
        """
        from pipemoe.trace import Timeline

        prompts = self._prompts(request, request["first"])
        with self._counted(self._model) as loads:
            self._model.prefill(prompts, timeline=Timeline())  # issued call by call
            self._world.all_gather(b"", "end of the counted step")  # its last rows have been counted
        issued = []
        for _ in range(FIGURE_STEPS if self._issued() is None else 0):
            timeline = Timeline()
            self._model.prefill(prompts, timeline=timeline)
            of_layer: dict[tuple[int, int], float] = {}
            for op, seconds in timeline.issue_seconds:
                of_layer[op.cohort, op.layer] = of_layer.get((op.cohort, op.layer), 0.0) + seconds
            issued.append(median(of_layer.values()) * 1e6)
        shape = self._model.decoder.shape
        figures = {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "issue_us_per_layer": median(issued) if issued else None,
        }
        return {**figures, **loads.figures(), "predicted_ttft_ms": self._predicted_ms(request["rank_tokens"])}

    def _predicted_ms(self, rank_tokens: list[int]) -> float | None:
        """The simulator's time to the slowest rank's first token, by the costs that the plan was made with."""
        from pipemoe.plan.schedule import Facts

        try:
            from pipemoe.plan.clock.prediction import simulate
        except ImportError:  # an older tree has it elsewhere
            return None
        runtime = self._model.runtime
        facts = Facts(tuple((n,) if n else () for n in rank_tokens))
        ttfts = simulate(runtime.plans.of_step(facts), runtime.cost).ttft
        return max(ttft for ttft in ttfts if ttft is not None) / 1e6


def main() -> None:
    options = parse()
    # In place of this script's folder: whatever --tree holds comes first, whoever has installed another.
    sys.path[0:1] = [str(options.tree), str(options.tree / "kernels")]
    case_server = module_from(CHECKOUT / "benchmarks" / "case_server.py", "case_server")
    answers = case_server.Answers()

    import torch
    from transformers import CONFIG_MAPPING

    counted = module_from(CHECKOUT / "benchmarks" / "routing_load.py", "routing_load").counted
    import pipemoe

    assert Path(pipemoe.__file__).is_relative_to(options.tree.resolve()), pipemoe.__file__
    raw = json.loads(options.model.read_text())
    config = CONFIG_MAPPING[raw.pop("model_type")].from_dict(raw)
    one_cohort = options.mode in ("padded", "broadcast", "chunked")  # one after another, in one slot
    # The others wait for rank 0's next request while another implementation has its turn.
    patience = {"watchdog_seconds": WATCHDOG_SECONDS}
    with pipemoe.init(options.device, num_slots=1 if one_cohort else None, **patience) as world:
        most = options.max_tokens
        named = {name: value for name in ("cost", "attention") if (value := getattr(options, name)) is not None}
        settings = pipemoe.Config(
            mode=options.mode,
            max_tokens_per_rank=most,
            moe_max_num_tokens=options.moe_max_num_tokens or most * world.size,
            **named,
        )
        more: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "seed": options.seed}
        if "router_skew" in inspect.signature(pipemoe.load_model).parameters:
            more["router_skew"] = options.router_skew
        else:  # a tree whose own random routers are not even
            place = CHECKOUT / "pipemoe" / "models" / "random_parameters.py"
            weights = module_from(place, "pipemoe.models.random_weights")  # what its loading will import
            weights.fill_random = partial(weights.fill_random, router_skew=options.router_skew)
        model = pipemoe.load_model(config, world, config=settings, **more)
        server = PipemoeServer(world, model, options, case_server.prompt, counted)
        if world.rank:
            server.follow()
            return
        answers.send({"num_ranks": world.size, "device": world.device.type, "mode": options.mode})
        case_server.serve(answers, server.answer_to)
        server.end()


if __name__ == "__main__":
    main()
