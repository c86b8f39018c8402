"""The models that ttft.py knows by name, and how a model is cut to its first layers.

Dimensions are the published ones (config.json of the Hugging Face repositories); `small` is ours, for machines without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipemoe.errors import CheckpointError, ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "vocab_size": 2048,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
    },
}


class BenchModel:
    """A model by preset name, or the path of a checkpoint directory or of a config.json alone (random weights)."""

    def __init__(self, name: str, layers: int | None = None) -> None:
        """layers: of its decoder layers, how many to keep from the first on (default: all)."""
        self._directory: Path | None = None
        if name in PRESETS:
            self.name, raw = name, PRESETS[name]
        else:
            path = Path(name)
            self.name = path.stem if path.suffix == ".json" else path.resolve().name
            if path.suffix != ".json":
                self._directory = path
            raw = self._read(path if self._directory is None else path / "config.json")
        self._config = dict(raw)
        self.num_layers = int(raw.get("num_hidden_layers", 0))
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
            known = ", ".join(PRESETS)
            raise CheckpointError(f"cannot read {file}: {error}; a model is one of {known}, or the path of a checkpoint") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file} holds a {type(raw).__name__}; an object is wanted")
        return raw

    @property
    def first_moe_layer(self) -> int:
        return int(self._config.get("first_k_dense_replace", 0))

    @contextmanager
    def source(self, layers: int) -> Iterator[Any]:
        """What pipemoe.load_model takes, for the first `layers` layers: a config, or a checkpoint directory (a cut one is a
        folder of links, which lasts as long as the context)."""
        config = {**self._config, "num_hidden_layers": layers}
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = config["layer_types"][:layers]
        if self._directory is None:
            yield config
        elif layers == self._stored_layers:
            yield self._directory
        else:
            with TemporaryDirectory(prefix="pipemoe_cut_") as folder:
                for file in self._directory.iterdir():
                    if file.is_file() and file.name != "config.json":
                        (Path(folder) / file.name).symlink_to(file.resolve())
                (Path(folder) / "config.json").write_text(json.dumps(config))
                yield Path(folder)
