"""The models that benchmarks/ttft takes, by name or by path, and how a model is cut to its first layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.model_facts.facts import MODEL_TYPES, cut_config, read_facts
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.output_path import write_whole

_MOST_POSITIONS = 1 << 20  # of a model whose config says nothing of them


class BenchModel:
    """A model by preset name, or the path of a checkpoint directory or of a config.json alone (random weights)."""

    def __init__(self, name: str, layers: int | None = None) -> None:
        """layers: how many of its decoder layers to keep, from the first on (default: all)."""
        self._directory: Path | None = None
        if name.lower() in MODEL_CONFIGS:
            self.name, raw = name.lower(), MODEL_CONFIGS[name.lower()]
        else:
            path = Path(name)
            self.name = path.stem if path.suffix == ".json" else path.resolve().name
            if path.suffix != ".json":
                self._directory = path
            raw = self._read(path if self._directory is None else path / "config.json")
            if self._directory is not None:
                self._check(path)
        self._config = dict(raw)
        # positions: tokens that a sequence may have
        self.num_layers, self.first_moe_layer, self.positions = _facts_of(raw)
        self._stored_layers = self.num_layers
        if layers is not None:
            if not 1 <= layers <= self.num_layers:
                raise ConfigError(f"--layers is {layers}; {self.name} has {self.num_layers}")
            self.num_layers = layers

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            raw = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            known = ", ".join(MODEL_CONFIGS)
            raise CheckpointError(
                f"cannot read {file}: {error}; a model is one of {known}, or the path of a checkpoint"
            ) from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file} holds a {type(raw).__name__}; an object is wanted")
        return raw

    @staticmethod
    def _check(directory: Path) -> None:
        """Later only rank 0 reads the checkpoint with transformers, whose errors the other ranks would not hear."""
        from pipemoe.models.checkpoint import Checkpoint

        with Checkpoint(directory):
            pass

    @property
    def random_weights(self) -> bool:
        """Is there no checkpoint?"""
        return self._directory is None

    @contextmanager
    def source(self, layers: int) -> Iterator[Any]:
        """What pipemoe.load_model takes, with `random_weights`, for the first `layers` layers: a config, or a
        checkpoint directory. A cut checkpoint is a folder of links, which lasts as long as the context.
        """
        config = cut_config(self._config, layers)
        if self._directory is None:
            yield config
        elif layers == self._stored_layers:
            yield self._directory
        else:
            with TemporaryDirectory(prefix="pipemoe_cut_") as folder:
                for file in self._directory.iterdir():
                    if file.is_file() and file.name != "config.json":
                        (Path(folder) / file.name).symlink_to(file.resolve())
                write_whole(Path(folder) / "config.json", json.dumps(config))
                yield Path(folder)


def _facts_of(raw: dict[str, Any]) -> tuple[int, int, int]:
    """Decoder layers, those before the first one with routed experts, and positions."""
    from pipemoe.models.families.whole import is_whole

    if raw.get("model_type") in MODEL_TYPES or not is_whole(raw.get("model_type")):
        facts = read_facts(raw)
        return facts.num_layers, facts.num_dense_layers_first, facts.positions
    from pipemoe.models.config import num_positions, read_config
    from pipemoe.models.whole_loading import find_sites, whole_skeleton

    config, _ = read_config(raw, random_weights=True)
    site = find_sites(whole_skeleton(config))[0]
    layer = re.search(r"\.(\d+)\.", site.name)
    return config.num_hidden_layers, int(layer[1]) if layer else 0, num_positions(config) or _MOST_POSITIONS
