"""A server of benchmarks/forward.py (see case_server.py): the same prompts through vLLM's AsyncLLM, if installed.

    python benchmarks/vllm_peer.py --model config.json --max-tokens 8192

One engine; `--num-ranks N` takes N GPUs, attention data parallel and experts expert parallel. CUDA graphs as vLLM makes
them, the FlashAttention backend, no prefix cache, greedy, one token a request. Once it is up, its dummy weights are
overwritten by pipemoe's random ones, so that both sides route alike and should find the same first tokens; where that
fails (another vLLM names its parameters otherwise), the dummy weights stay, and the rows say so.

A round's `ttft_ms` is the engine's own time from scheduling the prompt to its first token; `client_ttft_ms` is from the
call of `generate` to the token, which adds vLLM's message queues.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.case_server import Answers, prompt

ENVIRONMENT = {  # where the user has not said otherwise
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # there is nothing to fetch
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # a greedy token needs none, and vLLM fails where FlashInfer is not installed
}
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUND_SECONDS = 60.0
_EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.experts\..*(w13|w2)_weight$")


class PipemoeWeights:
    """Mixed into vLLM's workers; called there by name."""

    def take_pipemoe_weights(self, raw: Mapping[str, Any], seed: int, router_skew: float) -> str:
        """Overwrite all parameters, in place, with those that pipemoe draws for the config `raw` and `seed`."""
        import torch

        model = self.model_runner.model  # type: ignore[attr-defined]
        weights = RandomTensors(raw, seed, router_skew, next(model.parameters()).device)
        with torch.inference_mode():  # whether or not vLLM made them in it
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.of(name, parameter))
        torch.cuda.synchronize()
        return f"pipemoe's, seed {seed}, router skew {router_skew:g}"


class RandomTensors:
    """pipemoe's random weights by the names of vLLM's parameters."""

    def __init__(self, raw: Mapping[str, Any], seed: int, router_skew: float, device: Any) -> None:
        from pipemoe.models.config import read_config
        from pipemoe.models.families import check_config
        from pipemoe.models.random_parameters import Gains

        self._config, _ = read_config(dict(raw), random_weights=True)
        self._family, self._gains = check_config(self._config), Gains.of(self._config, router_skew)
        self._seed, self._device = seed, device
        self._layer: tuple[int, Any] = (-1, None)

    def of(self, name: str, parameter: Any) -> Any:
        """A parameter's value, of its shape, on its device. Raises ValueError if vLLM lays it out otherwise."""
        import torch

        experts = _EXPERTS.search(name)
        if experts:
            made = self._experts(int(experts[1]), parameter.dtype)
            value = made.gate_up if experts[2] == "w13" else made.down
        elif name.endswith("qkv_proj.weight"):
            config = self._config
            heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            value = torch.cat(
                [
                    self._parameter(name.replace("qkv_proj", f"{part}_proj"), parameter, count * config.head_dim)
                    for part, count in zip("qkv", heads)
                ]
            )
        else:
            value = self._parameter(name, parameter, len(parameter))
        if value.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, pipemoe's {tuple(value.shape)}")
        return value

    def _parameter(self, name: str, like: Any, num_rows: int) -> Any:
        import torch

        from pipemoe.models.random_parameters import random_parameter

        shape = torch.Size([num_rows, *like.shape[1:]])
        return random_parameter(name, shape, seed=self._seed, device=self._device, dtype=like.dtype, gains=self._gains)

    def _experts(self, layer: int, dtype: Any) -> Any:
        """All experts of decoder layer `layer`; the latest layer's are kept."""
        from pipemoe.models.random_parameters import random_experts

        if self._layer[0] != layer:
            self._layer = (-1, None)
            config, family = self._config, self._family
            made = random_experts(
                family.moe_layers(config).index(layer),
                range(family.num_experts(config)),
                hidden=config.hidden_size,
                intermediate=family.intermediate(config),
                seed=self._seed,
                device=self._device,
                dtype=dtype,
            )
            self._layer = layer, made
        return self._layer[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Prefill by vLLM, asked over pipes.")
    parser.add_argument("--model", type=Path, required=True, help="a config.json")
    parser.add_argument("--max-tokens", type=int, required=True, help="of the longest prompt")
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--router-skew", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.6, help="share of the GPU's memory that vLLM may take")
    return parser.parse_args()


def make_engine(options: argparse.Namespace, raw: Mapping[str, Any], folder: str) -> Any:
    """vLLM's engine with dummy weights, up and warm."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    named = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[raw["model_type"]]], **raw}
    Path(folder, "config.json").write_text(json.dumps(named))
    room = -(-(options.max_tokens + 1) // 256) * 256
    arguments = AsyncEngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=options.dtype,
        seed=0,
        data_parallel_size=options.num_ranks,
        enable_expert_parallel=options.num_ranks > 1,
        max_model_len=room,
        max_num_batched_tokens=room,
        max_num_seqs=64,
        enable_prefix_caching=False,
        gpu_memory_utilization=options.memory,
        attention_backend="FLASH_ATTN",
        generation_config="vllm",
        compilation_config={"cudagraph_capture_sizes": list(GRAPH_SIZES)},
        worker_extension_cls="benchmarks.vllm_peer.PipemoeWeights",
    )
    return AsyncLLM.from_engine_args(arguments)


class VllmServer:
    """Requests of the benchmark, through the engine."""

    def __init__(self, engine: Any, options: argparse.Namespace, vocab_size: int) -> None:
        self._engine, self._options, self._vocab_size = engine, options, vocab_size
        self._count = 0

    async def answer_to(self, request: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"rank_ttft_ms": [], "client_ttft_ms": [], "first_tokens": []}
        first, tokens = request["first"], request["rank_tokens"]
        for number in [*range(-request["warm_up"], 0), *range(first, first + request["rounds"])]:
            ranks = range(self._options.num_ranks)
            prompts = [prompt(self._options.seed, tokens[rank], number, rank, self._vocab_size) for rank in ranks]
            await asyncio.sleep(request["gap_s"])
            jobs = [self._first_token(ids, rank) for rank, ids in enumerate(prompts)]
            of_ranks = await asyncio.wait_for(asyncio.gather(*jobs), ROUND_SECONDS)
            if number >= 0:
                found["client_ttft_ms"].append(1e3 * max(seconds for seconds, _, _ in of_ranks))
                found["rank_ttft_ms"].append([1e3 * seconds for _, seconds, _ in of_ranks])
                found["first_tokens"].append([token for _, _, token in of_ranks])
        return found

    async def _first_token(self, ids: list[int], rank: int) -> tuple[float, float, int]:
        """Seconds at the client and in the engine, and the token."""
        from vllm import SamplingParams

        greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        self._count += 1
        place = {"data_parallel_rank": rank} if self._options.num_ranks > 1 else {}
        begin = time.perf_counter()
        client_seconds, token, output = None, -1, None
        async for output in self._engine.generate({"prompt_token_ids": ids}, greedy, str(self._count), **place):
            if client_seconds is None and output.outputs[0].token_ids:
                client_seconds, token = time.perf_counter() - begin, int(output.outputs[0].token_ids[0])
        assert client_seconds is not None and output is not None
        return client_seconds, output.metrics.first_token_ts - output.metrics.scheduled_ts, token


async def run(answers: Answers, options: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Serve until there are no more requests."""
    import vllm

    with TemporaryDirectory(prefix="vllm_model_") as folder:
        engine = make_engine(options, raw, folder)
        try:
            try:
                call = ("take_pipemoe_weights", None, (raw, options.seed, options.router_skew))
                weights = (await engine.collective_rpc(*call))[0]
            except Exception as error:  # noqa: BLE001  (of the worker's process, of any type)
                weights = f"vLLM's dummy ones, as pipemoe's could not be copied: {error}"
            facts = {"num_ranks": options.num_ranks, "version": vllm.__version__, "weights": weights}
            answers.send({**facts, "memory_share": options.memory})
            server = VllmServer(engine, options, raw["vocab_size"])
            requests = answers.requests()
            while (request := await asyncio.to_thread(next, requests, None)) is not None:
                try:
                    answer = await server.answer_to(request)
                except Exception as error:
                    answers.send({"error": f"{type(error).__name__}: {error}"})
                    raise
                answers.send(answer)
        finally:
            engine.shutdown()


def main() -> None:
    options = parse()
    answers = Answers()
    if importlib.util.find_spec("vllm") is None:
        answers.send({"absent": "vLLM is not installed"})
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # its worker processes find the extension of this file by name
    path = [sys.path[0], str(Path(sys.path[0]) / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    asyncio.run(run(answers, options, json.loads(options.model.read_text())))


if __name__ == "__main__":
    main()
