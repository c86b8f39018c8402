"""Hugging Face checkpoints, safetensors only: a checkpoint that needs pickle is refused, never opened.

    checkpoint/
      config.json
      model.safetensors                  or  model.safetensors.index.json + model-00001-of-000NN.safetensors ...

Headers of all shards are read first, so that a missing tensor or a truncated shard is found before any weight moves.
Weights are then read tensor by tensor (experts: only this rank's) out of memory-mapped files.

DeepSeek-V3's own checkpoints hold a matrix `name` as e4m3 beside `name`_scale_inv, a number for each 128 x 128 values
(the word says inverse, but values are multiplied by it): float32, bfloat16, or a power of two (e8m0). They are widened
while reading; fp8 experts take them as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipemoe.e4m3 import BLOCK, dequantise_weight, num_blocks
from pipemoe.errors import CheckpointError
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pipemoe.models.families import Family
    from pipemoe.models.progress import Progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")  # tables that a few families have
SCALES = (*READABLE, "F8_E8M0")
QUANTISED, SCALES_SUFFIX = "F8_E4M3", "_scale_inv"
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of every shard, for the digest


class StoredTensor(NamedTuple):
    """Where a tensor lies and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """One checkpoint directory, open for reading; a context manager.

    where: the beginning of every error message, "rank {r}: ".
    Raises CheckpointError for a missing, truncated or damaged shard, and for pickle-only directories.
    """

    def __init__(self, directory: Path, where: str = "") -> None:
        self.directory = directory
        self.where = where
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0  # of tensor data
        self.progress: Progress | None = None  # is told what is read
        self._open: dict[Path, Any] = {}
        self._hash = hashlib.sha256()
        shards, place_of = self._shards()
        self.num_shards = len(shards)
        for shard in shards:
            self._read_header(shard, place_of)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def digest(self) -> str:
        """Hash of all headers and of samples of every shard's data: fine-tunes of one model differ too."""
        return self._hash.hexdigest()

    def locate(self, names: Sequence[str], shape: tuple[int, ...], *, is_floating: bool = True) -> str:
        """The first of `names` that is stored. Raises CheckpointError if none is, or if its shape or dtype is wrong.

        is_floating: of the model's tensor; False: it holds integers.
        """
        name = next((name for name in names if name in self.tensors), None)
        if name is None:
            raise self._error(
                self.directory,
                f"tensor {' or '.join(names)} is missing from all of its {self.num_shards} shards; "
                "fetch the checkpoint again, or check that config.json belongs to it",
            )
        stored = self.tensors[name]
        if stored.shape != shape:
            raise self._error(
                stored.file,
                f"tensor {name} has shape {stored.shape}; the config wants {shape}. Check that config.json belongs "
                "to it",
            )
        if stored.dtype == QUANTISED and self.scales_of(name) and len(shape) in (2, 3):
            self._check_scales(name, (*shape[:-2], num_blocks(shape[-2]), num_blocks(shape[-1])))
        elif stored.dtype not in (READABLE if is_floating else INTEGERS):
            missing = f", and {name}{SCALES_SUFFIX} is missing" if stored.dtype == QUANTISED else ""
            raise self._error(
                stored.file,
                f"tensor {name} is stored as {stored.dtype}{missing}; {', '.join(READABLE)} can be read, and "
                f"{QUANTISED} matrices with their {SCALES_SUFFIX}. "
                "Is the checkpoint quantised in another way? Convert it to bfloat16 first",
            )
        return name

    def scales_of(self, name: str) -> str | None:
        """The stored scales of a quantised matrix, if it is one and has them."""
        stored, scales = self.tensors.get(name), name + SCALES_SUFFIX
        return scales if stored and stored.dtype == QUANTISED and scales in self.tensors else None

    def _check_scales(self, name: str, shape: tuple[int, ...]) -> None:
        scales = self.tensors[name + SCALES_SUFFIX]
        if scales.shape != shape or scales.dtype not in SCALES:
            raise self._error(
                scales.file,
                f"tensor {name}{SCALES_SUFFIX} has shape {scales.shape} and is stored as {scales.dtype}; one of "
                f"{', '.join(SCALES)} for each 128 x 128 values of {name} is wanted, shape {shape}. "
                "Fetch the checkpoint again",
            )

    def read(
        self, names: Sequence[str], shape: tuple[int, ...], rows: range | None = None, *, is_floating: bool = True
    ) -> torch.Tensor:
        """Read the first of `names` that is stored, on the host, in its stored dtype; only `rows` of it, if given.

        shape: the whole tensor's. A quantised matrix is widened to float32. Raises what `locate` raises.
        """
        name = self.locate(names, shape, is_floating=is_floating)
        if self.tensors[name].dtype == QUANTISED:
            values, scales = self.read_quantised(name, rows if len(shape) == 3 else None)
            if len(shape) == 3:
                return torch.stack([dequantise_weight(v, s, torch.float32) for v, s in zip(values, scales)])
            return dequantise_weight(values, scales, torch.float32)
        return self._read(name, rows)

    def read_quantised(self, name: str, rows: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A quantised matrix [N, Kd] as it is, and its scales [N/128, Kd/128] float32, both rounded up; on the host. Of
        a stack of them only `rows`, if given.
        """
        return self._read(name, rows), self._read(name + SCALES_SUFFIX, rows).float()

    def read_raw(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A stored tensor, or rows of it, as it is; on the host."""
        return self._read(name, rows)

    def is_scales(self, name: str) -> bool:
        """Does it hold the scales of a stored matrix?"""
        return self.scales_of(name.removesuffix(SCALES_SUFFIX)) == name

    def _read(self, name: str, rows: range | None = None) -> torch.Tensor:
        file = self.tensors[name].file
        try:
            view = self._handle(file).get_slice(name)
            tensor = view[:] if rows is None else view[rows.start : rows.stop]
        except Exception as error:  # safetensors raises its own and OSError
            raise self._error(file, f"tensor {name} cannot be read: {error}; fetch the file again") from error
        self.bytes_read += tensor.nbytes
        if self.progress is not None:
            self.progress.add(tensor.nbytes)
        return tensor

    def check_experts(self, family: Family, config: PreTrainedConfig, experts: range) -> None:
        """Raise what read_experts would raise for a missing or wrong tensor, before anything is read."""
        hidden, width, total = config.hidden_size, family.intermediate(config), family.num_experts(config)
        for layer in family.moe_layers(config):
            fused_gate_up, fused_down = family.fused_names(layer)
            if fused_gate_up in self.tensors:
                self.locate([fused_gate_up], (total, 2 * width, hidden))
                self.locate([fused_down], (total, hidden, width))
                continue
            for expert in experts:
                gate_name, up_name, down_name = family.expert_names(layer, expert)
                self.locate([gate_name], (width, hidden))
                self.locate([up_name], (width, hidden))
                self.locate([down_name], (hidden, width))

    def read_experts(
        self,
        family: Family,
        config: PreTrainedConfig,
        experts: range,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantised: bool = False,
    ) -> list[ExpertWeights]:
        """Weights of the global expert ids `experts`, one ExpertWeights per MoE layer; other experts stay unread.

        quantised: in e4m3, as stored or made from what is stored; else in `dtype`.
        """
        hidden, width, total = config.hidden_size, family.intermediate(config), family.num_experts(config)
        result = []
        for layer in family.moe_layers(config):
            # If a projection ends within a block, its scales are not those of gate and up together.
            whole = experts and width % BLOCK == 0
            if (
                quantised
                and whole
                and self._holds_quantised([n for e in experts for n in family.expert_names(layer, e)])
            ):
                result.append(self._read_quantised_experts(family, layer, experts, hidden, width, device))
                continue
            gate_up = torch.empty(len(experts), 2 * width, hidden, dtype=dtype, device=device)
            down = torch.empty(len(experts), hidden, width, dtype=dtype, device=device)
            fused_gate_up, fused_down = family.fused_names(layer)
            if fused_gate_up in self.tensors:
                if experts:
                    gate_up.copy_(self.read([fused_gate_up], (total, 2 * width, hidden), experts))
                    down.copy_(self.read([fused_down], (total, hidden, width), experts))
            else:
                for local, expert in enumerate(experts):
                    gate_name, up_name, down_name = family.expert_names(layer, expert)
                    gate_up[local, :width].copy_(self.read([gate_name], (width, hidden)))
                    gate_up[local, width:].copy_(self.read([up_name], (width, hidden)))
                    down[local].copy_(self.read([down_name], (hidden, width)))
            weights = ExpertWeights(gate_up, down, first_expert=experts.start)
            result.append(quantise_experts(weights) if quantised else weights)
        return result

    def _holds_quantised(self, names: Sequence[str]) -> bool:
        return all(name in self.tensors and self.tensors[name].dtype == QUANTISED for name in names)

    def _read_quantised_experts(
        self, family: Family, layer: int, experts: range, hidden: int, width: int, device: torch.device
    ) -> ExpertWeights:
        def empty(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            values = torch.empty(len(experts), rows, columns, dtype=torch.float8_e4m3fn, device=device)
            return values, torch.empty(
                len(experts), num_blocks(rows), num_blocks(columns), dtype=torch.float32, device=device
            )

        gate_up, gate_up_scales = empty(2 * width, hidden)
        down, down_scales = empty(hidden, width)
        for local, expert in enumerate(experts):
            gate, up, down_read = (self.read_quantised(name) for name in family.expert_names(layer, expert))
            for target, parts in ((gate_up, (gate[0], up[0])), (gate_up_scales, (gate[1], up[1]))):
                target[local].copy_(torch.cat(parts))
            down[local].copy_(down_read[0])
            down_scales[local].copy_(down_read[1])
        return ExpertWeights(
            gate_up, down, first_expert=experts.start, gate_up_scales=gate_up_scales, down_scales=down_scales
        )

    def _handle(self, file: Path):
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(file, framework="pt", device="cpu").__enter__()
        return self._open[file]

    def _shards(self) -> tuple[list[Path], dict[str, str]]:
        """All shards, and the shard of each tensor as the index has it."""
        place_of: dict[str, str] = {}
        if not self.directory.is_dir():
            raise self._error(self.directory, "is not a directory; give a checkpoint directory")
        index = self.directory / INDEX
        if index.exists():
            try:
                place_of = dict(json.loads(index.read_text())["weight_map"])
                names = sorted(set(place_of.values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._error(index, f"is not a shard index ({error!r}); fetch it again") from error
            for name in names:
                self._check_shard_name(index, name)
            shards = [self.directory / name for name in names]
        else:
            shards = [self.directory / SINGLE]
            if not shards[0].exists():
                raise self._error(self.directory, self._why_nothing())
        for shard in shards:
            if not shard.is_file():
                raise self._error(shard, f"shard is missing, but {index.name} lists it; fetch it again")
        return shards, place_of

    def _check_shard_name(self, index: Path, name: object) -> None:
        """An index comes from elsewhere, so it must not lead out of the directory. Links may: downloads are often links
        to one store.
        """
        text = name if isinstance(name, str) else ""
        parts = PurePosixPath(text).parts
        if (
            not parts
            or ".." in parts
            or PurePosixPath(text).is_absolute()
            or "\\" in text
            or "\0" in text
            or not text.endswith(".safetensors")
        ):
            raise self._error(
                index,
                f"lists the shard {name!r}; a shard is a .safetensors file inside of {self.directory}. Fetch the "
                "index again",
            )

    def _why_nothing(self) -> str:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.directory.glob(pattern))
        if pickles:
            return (
                f"holds no safetensors, only {pickles[0]}{' and others' if len(pickles) > 1 else ''}, which is "
                "pickle: loading it "
                "can run code, so pipemoe never does. Convert it with save_pretrained of transformers"
            )
        return f"holds neither {SINGLE} nor {INDEX}; fetch the checkpoint's safetensors files"

    def _read_header(self, shard: Path, place_of: Mapping[str, str]) -> None:
        """Index one shard: 8 bytes little-endian header size, JSON header, data. place_of: see _shards."""
        size = shard.stat().st_size
        with shard.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + header_size > size:
                raise self._error(shard, f"shard is truncated: {size} bytes do not hold its header; fetch it again")
            raw = file.read(header_size)
            try:
                header = json.loads(raw)
                header.pop("__metadata__", None)
                stored = {n: StoredTensor(shard, t["dtype"], tuple(t["shape"])) for n, t in header.items()}
                end = 8 + header_size + max((t["data_offsets"][1] for t in header.values()), default=0)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._error(shard, f"shard has a damaged header ({error!r}); fetch it again") from error
            if size < end:
                raise self._error(shard, f"shard is truncated: {size} bytes of {end}; fetch it again")
            self._hash.update(json.dumps([shard.name, end]).encode() + raw)
            for sample in range(_SAMPLES):
                file.seek(8 + header_size + (end - 8 - header_size) * sample // _SAMPLES)
                self._hash.update(file.read(_SAMPLE_BYTES))
        for name, tensor in stored.items():
            if name in place_of and self.directory / place_of[name] != shard:
                continue  # the index says that it belongs to another shard
            if name in self.tensors:
                raise self._error(
                    shard,
                    f"tensor {name} is in {self.tensors[name].file.name} as well, and no index says which one holds",
                )
            self.tensors[name] = tensor

    def _error(self, file: Path, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}{file}: {what}")
