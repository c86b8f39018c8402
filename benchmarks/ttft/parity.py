"""Parity: every mode's logits and first tokens against the plain Hugging Face forward, before anything is timed.

float32: the same first tokens. bfloat16 and float16: logits within 2e-2 by norm ratio, and the same token wherever the
reference's top-2 margin exceeds twice the largest error of that prompt's logits.

Rank 0 runs the reference on all ranks' prompts, frees it, and compares what the ranks send it. The whole model with all
experts must fit on one device for that, so large models are cut to their first layers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import pipemoe
from benchmarks.bench_main import Progress
from benchmarks.ttft.inputs import Step

if TYPE_CHECKING:
    import torch

    from pipemoe import Config, World

MAX_NORM_RATIO = 2e-2


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a mode is from the reference, over all prompts checked."""

    ok: bool
    norm_ratio: float | None  # |logits - reference| / |reference|
    wrong_tokens: int
    prompts: int
    layers: int


def check_parity(
    world: World,
    source: Any,
    layers: int,
    configs: Sequence[Config],
    steps: Sequence[Step],
    *,
    dtype: torch.dtype,
    seed: int,
    router_skew: float,
    progress: Progress,
    keep: bool = False,
) -> tuple[dict[str, Parity], dict[str, pipemoe.Model]]:
    """Parity of each config's mode on `steps`; every rank calls and gets the same. And the models by mode if `keep`,
    else no weights are left behind.

    source: what load_model takes, already cut to `layers`.
    """
    reference = _reference_logits(source, steps, world, dtype, seed, router_skew) if world.rank == 0 else []
    free_memory(world)
    progress.say("reference done; loading the same layers on all ranks")
    base = pipemoe.load_model(
        source,
        world,
        random_weights=isinstance(source, dict),
        config=configs[0],
        dtype=dtype,
        seed=seed,
        router_skew=router_skew,
    )
    found, models = {}, {}
    for config in configs:
        model = base if config is configs[0] else base.with_config(config)
        logits = [row for step in steps for row in _pipemoe_logits(world, model, step, seed)]
        found[config.mode] = asdict(compare(logits, reference, dtype_name(dtype), layers)) if world.rank == 0 else None
        progress.count(len(found), len(configs), "parity: modes")
        if keep:
            models[config.mode] = model
        del model
    del base
    verdicts = json.loads(world.all_gather(json.dumps(found).encode(), "results of the parity check")[0])
    free_memory(world)
    return {mode: Parity(**verdict) for mode, verdict in verdicts.items()}, models


def compare(
    found: Sequence[tuple[int, np.ndarray]], reference: Sequence[np.ndarray], dtype: str, layers: int = 0
) -> Parity:
    """found: first token and logits [V] of every prompt; reference: its logits [V]."""
    error_squares = reference_squares = 0.0
    wrong = 0
    for (token, logits), wanted in zip(found, reference, strict=True):
        error = logits.astype(np.float64) - wanted
        error_squares += float(error @ error)
        reference_squares += float(wanted.astype(np.float64) @ wanted)
        best, second = np.sort(wanted)[:-3:-1]
        decided = dtype == "float32" or best - second > 2 * np.abs(error).max()
        # NaN compares false: only the norm ratio catches an undecided NaN
        wrong += bool(token != int(wanted.argmax()) and decided)
    ratio = float(np.sqrt(error_squares / max(reference_squares, 1e-300)))
    near = np.isfinite(ratio) and (dtype == "float32" or ratio <= MAX_NORM_RATIO)
    return Parity(bool(near and not wrong), ratio if np.isfinite(ratio) else None, wrong, len(reference), layers)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_memory(world: World) -> None:
    """Give back memory that nothing refers to any longer; every rank calls."""
    import torch

    world.all_gather(b"", "freeing memory")  # the conductor lets go of its last step
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _reference_logits(
    source: Any, steps: Sequence[Step], world: World, dtype: torch.dtype, seed: int, router_skew: float
) -> list[np.ndarray]:
    """The plain forward's last logits [V] of every prompt, in order of step, rank and position."""
    import torch

    from pipemoe.models.random_weights import reference_model

    model = reference_model(
        source, world.device, dtype, seed, random_weights=isinstance(source, dict), router_skew=router_skew
    )
    logits = []
    with torch.inference_mode():
        for prompt in (p for step in steps for of_rank in step for p in of_rank):
            ids = prompt.token_ids(model.config.vocab_size, seed).to(world.device)
            logits.append(model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu().numpy())
    return logits


def _pipemoe_logits(world: World, model: pipemoe.Model, step: Step, seed: int) -> list[tuple[int, np.ndarray]]:
    """First token and logits [V] of every prompt of the step, on rank 0; nothing elsewhere."""
    vocab_size = model.decoder.vocab_size
    own = step[world.rank]
    prefilled = model.prefill([p.token_ids(vocab_size, seed) for p in own], keep_logits=True)
    logits = prefilled.logits.cpu().numpy() if own else np.empty((0, vocab_size), np.float32)
    payload = (
        np.asarray(prefilled.first_tokens, np.int64).tobytes() + np.ascontiguousarray(logits, np.float32).tobytes()
    )
    payloads = world.all_gather(payload, "logits for the parity check")
    found: list[tuple[int, np.ndarray]] = []
    if world.rank == 0:
        for of_rank, payload in zip(step, payloads, strict=True):
            tokens = np.frombuffer(payload, np.int64, len(of_rank))
            rows = np.frombuffer(payload, np.float32, offset=tokens.nbytes).reshape(len(of_rank), vocab_size)
            found += zip(tokens.tolist(), rows, strict=True)
    return found
