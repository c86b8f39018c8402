"""What the cases of one process share: the world, tiny checkpoints, references, and models made when first needed."""

from __future__ import annotations

import contextlib
import io
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

import pipemoe
from pipemoe import Config, PipelinedMoE
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import FAMILIES, tiny_config
from tests.moe_cases import NUM_EXPERTS, TOP_K, Layers, make_layers, make_rows, norm_ratio

MOST_TOKENS, POSITIONS = 96, 64  # a step's per rank, and of the models
SMALL = {"max_tokens_per_rank": MOST_TOKENS, "moe_max_num_tokens": 24}
SETTINGS = (  # of models and layers that valid calls go to
    {},
    {"mode": "per_rank", "deterministic": True},
    {"mode": "two_batch", "debug": True, "moe_max_num_tokens": 7},
    {"mode": "padded", "combine": "gather"},
)
SEED = 3  # of the weights


class Stage:
    """`folder` is this rank's own."""

    def __init__(self, world: pipemoe.World | None, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._made: dict[Any, Any] = {}
        self.num_folders = 0

    @property
    def rank(self) -> int:
        return self.world.rank if self.world else 0

    def once(self, key: Any, make: Any) -> Any:
        """What `make` gives, the first time; every rank comes here in the same case."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def new_folder(self) -> Path:
        self.num_folders += 1
        folder = self.folder / f"case{self.num_folders}"
        folder.mkdir()
        return folder

    @staticmethod
    def config(setting: int) -> Config:
        return Config(**{**SMALL, **SETTINGS[setting]})

    def checkpoint(self, family: str) -> Path:
        """A checkpoint of two decoder layers in several shards."""

        def make() -> Path:
            folder = self.folder / family
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
                reference_of(family).save_pretrained(folder, max_shard_size="60KB", save_original_format=True)
            return folder

        return self.once(("checkpoint", family), make)

    def model(self, family: str, setting: int) -> pipemoe.Model:
        base = self.once(
            ("model", family), lambda: pipemoe.load_model(self.checkpoint(family), self.world, config=self.config(0))
        )
        return self.once(("model", family, setting), lambda: base.with_config(self.config(setting)))

    def layers(self, num_layers: int) -> Layers:
        return self.once(("layers", num_layers), lambda: make_layers(num_layers, torch.device("cpu"), torch.float32))

    def moe(self, num_layers: int, setting: int) -> PipelinedMoE:
        return self.once(("moe", num_layers, setting), lambda: new_moe(self, self.config(setting), num_layers))

    @cached_property
    def canary_rows(self) -> tuple:
        rows = make_rows(3 + 2 * self.rank, 1000 + self.rank, torch.device("cpu"), torch.float32)
        return rows, self.layers(1).oracle(0, *rows)

    def canary(self, *, with_model: bool, anew: bool) -> str | None:
        """A valid call; says what is wrong with its result. anew: to a layer that is made for it."""
        rows, wanted = self.canary_rows
        moe = new_moe(self, self.config(0)) if anew else self.moe(1, 0)
        ratio = norm_ratio(moe(*rows), wanted)
        if not ratio < 1e-5:
            return f"the next layer call is off by {ratio}"
        if with_model:
            return judge_prefilled(FAMILIES[0], self.model(FAMILIES[0], 0).prefill([[1, 2, 3], [5]]), [[1, 2, 3], [5]])
        return None


def new_moe(stage: Stage, config: Config, num_layers: int = 1) -> PipelinedMoE:
    weights = stage.layers(num_layers).local(stage.world.size, stage.world.rank)
    return PipelinedMoE(stage.world, weights, num_experts=NUM_EXPERTS, top_k=TOP_K, config=config)


@cache
def reference_of(family: str) -> Any:
    """transformers' own model."""
    config = tiny_config(family, num_layers=2, max_position_embeddings=POSITIONS)
    return reference_model(config, "cpu", torch.float32, seed=SEED)


@cache
def reference_logits(family: str, tokens: tuple[int, ...]) -> torch.Tensor:
    return logits_of(reference_of(family), tokens)


def logits_of(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].float()


def judge_prefilled(reference: Any, found: Any, sequences: list[list[int]]) -> str | None:
    """What is wrong with a Prefilled of `sequences`. reference: a family's name, or a transformers model."""
    if not isinstance(found, pipemoe.Prefilled):
        return f"prefill gave a {type(found).__name__}"
    if len(found.first_tokens) != len(sequences) or len(found.ttft_seconds) != len(sequences):
        return f"{len(found.first_tokens)} first tokens for {len(sequences)} sequences"
    if not all(0 < seconds < 1000 for seconds in found.ttft_seconds):
        return f"times to first token {found.ttft_seconds}"
    if found.finite != [True] * len(sequences):
        return f"finite is {found.finite} for {len(sequences)} sequences"
    for i, sequence in enumerate(sequences):
        tokens = tuple(sequence)
        wanted = reference_logits(reference, tokens) if isinstance(reference, str) else logits_of(reference, tokens)
        first = found.first_tokens[i]
        if type(first) is not int or not 0 <= first < len(wanted) or not wanted[first] >= wanted.max() - 1e-4:
            return f"sequence {i}: first token {first!r}, wanted {int(wanted.argmax())}"
        if found.logits is not None and not norm_ratio(found.logits[i], wanted) < 1e-4:
            return f"sequence {i}: logits are off by {norm_ratio(found.logits[i], wanted)}"
    return None
