"""load_model: checkpoints damaged or changed on disk, and the arguments beside them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch

import pipemoe
from pipemoe import Config
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import model_config
from pipemoe.models.random_weights import reference_model
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, wanted_of
from tests.fuzz.checkpoint_changes import change_config, change_shard, linked_copy
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.prefill_cases import some_sequences
from tests.fuzz.stage import POSITIONS, SEED, SMALL, Stage, judge_prefilled
from tests.models.tiny import FAMILIES, tiny_config


def load(draw: Draw, stage: Stage) -> Case:
    """load_model of a changed checkpoint."""
    family = draw.random.choice(FAMILIES)
    source = stage.checkpoint(family)

    def mutated(random: Random) -> Argument:
        folder = stage.new_folder()
        linked_copy(source, folder)
        if random.random() < 0.5:
            return Argument(change_config(folder, random), folder, ODD)
        what, meaning = change_shard(folder, random)
        return Argument(what, folder, meaning)

    arguments = draw.per_rank(mutated, lambda _: Argument("as saved", source))
    folder = arguments[draw.rank].value
    sequences = [some_sequences(draw.random) for _ in range(draw.size)][draw.rank]

    def call() -> Any:
        return pipemoe.load_model(folder, stage.world, config=Config(**SMALL))

    def judge(model: pipemoe.Model) -> str | None:
        return judge_loaded(model, folder, sequences)

    return Case(f"load_model of a checkpoint ({family})", arguments, call, judge, wanted_of(arguments), makes=True)


def judge_loaded(model: pipemoe.Model, folder: Path, sequences: list[list[int]]) -> str | None:
    """A model that loaded must be the one that transformers loads, and planned for as it is."""
    found = model.prefill(sequences, keep_logits=True)
    planned = dimensions_of(model_config(str(folder))).shape
    if planned != model.runtime.shape:
        return f"plan takes it for {planned}, load_model for {model.runtime.shape}"
    try:
        reference = reference_model(folder, "cpu", torch.float32)
    except Exception:  # noqa: BLE001  (what transformers cannot load may be right all the same: another rank's tensor)
        return None
    wanted = [reference(torch.tensor([sequence])).logits[0, -1].float() for sequence in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in wanted):
        return None
    return judge_prefilled(reference, found, sequences)


def load_arguments(draw: Draw, stage: Stage) -> Case:
    """load_model with an odd argument, or an odd thing in the place of a checkpoint."""
    family = draw.random.choice(FAMILIES)
    source = stage.checkpoint(family)
    config = Config(**SMALL)

    def mutated(random: Random) -> Argument:
        what, value = odd_value(random)
        number, odd = odd_number(random, 3)
        tiny = tiny_config(family, num_layers=2, max_position_embeddings=POSITIONS)
        key = random.choice(sorted(tiny.to_dict()))
        changed = tiny_config(family, num_layers=2, max_position_embeddings=POSITIONS)
        try:
            setattr(changed, key, value)
        except Exception:  # noqa: BLE001  (transformers checks some)
            key = None
        choices: dict[str, tuple[dict[str, Any], str, Any]] = {
            "a string path": ({"path_or_config": str(source)}, RIGHT, ""),
            "a path of config.json": ({"path_or_config": source / "config.json"}, WRONG, None),
            "a path of a shard": ({"path_or_config": next(source.glob("*.safetensors"))}, WRONG, None),
            "a path that is not there": ({"path_or_config": source / "nowhere"}, WRONG, None),
            "a relative path of nothing": ({"path_or_config": "no/such/model"}, WRONG, None),
            "a dict": ({"path_or_config": tiny.to_dict()}, WRONG, None),
            "a dict, for random weights": (
                {"path_or_config": tiny.to_dict(), "seed": SEED, "random_weights": True},
                RIGHT,
                "random",
            ),
            "a path of config.json, for random weights": (
                {"path_or_config": source / "config.json", "random_weights": True, "seed": SEED},
                RIGHT,
                "random" if family == "deepseek_v3" else "json",  # there the file says the same as the object
            ),
            f"random_weights is {what}": ({"random_weights": value}, ODD, None),
            "an empty folder": ({"path_or_config": stage.folder}, WRONG, None),
            "random weights": ({"path_or_config": tiny, "seed": SEED}, RIGHT, "random"),
            f"path_or_config is {what}": ({"path_or_config": value}, ODD, None),
            f"a config whose {key} is {what}": ({"path_or_config": changed}, ODD, None),
            f"config is {what}": ({"config": value}, ODD, None),
            f"world is {what}": ({"world": value}, WRONG, None),
            f"dtype is {what}": ({"dtype": value}, ODD, None),
            "dtype is float64": ({"dtype": torch.float64}, WRONG, None),
            "dtype is int8": ({"dtype": torch.int8}, WRONG, None),
            "dtype is a string": ({"dtype": "float32"}, ODD, None),
            "dtype is bfloat16": ({"dtype": torch.bfloat16}, RIGHT, "bfloat16"),
            f"seed is {what}": ({"path_or_config": tiny, "seed": value}, ODD, None),
            f"seed is {number}": ({"path_or_config": tiny, "seed": odd}, ODD, None),
        }
        name = random.choice(list(choices))
        passed, meaning, same = choices[name]
        return Argument(name, passed, meaning, same)

    arguments = draw.per_rank(mutated, lambda _: Argument("nothing odd", {}, RIGHT, ""))
    sequences = [some_sequences(draw.random) for _ in range(draw.size)][draw.rank]

    def call() -> Any:
        return pipemoe.load_model(
            **({"path_or_config": source, "world": stage.world, "config": config} | arguments[draw.rank].value)
        )

    def judge(model: pipemoe.Model) -> str | None:
        found = model.prefill(sequences)
        return judge_prefilled(family, found, sequences) if all(a.same in ("", "random") for a in arguments) else None

    return Case(f"load_model ({family})", arguments, call, judge, wanted_of(arguments), makes=True)
