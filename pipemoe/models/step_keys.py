"""Keys and values of a step at fixed addresses, so that CUDA graphs can hold the attention of sequences that are cut.

    keys of one decoder layer   | sequence 0 | sequence 1 ........ | sequence 2 |  not used  | padding |
    rows                        each sequence's one behind another, whichever microbatch computed them    max_tokens

A microbatch writes its rows and reads those of its sequences so far. Microbatches of a sequence may run on different
streams; the caller orders them by events, layer by layer, and runs one step after the other. This serves attention for
which FlashAttention finds pieces by offsets in device memory (see attention.py), and whose cache holds the keys
themselves; and the fused path, which keeps the latents of multi-head latent attention here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.packing import Packing


class StepKeys:
    """Room for `max_tokens` tokens in every decoder layer, and one more row that padding writes to."""

    def __init__(
        self, decoder: Decoder, max_tokens: int, num_layers: int | None = None, longest: int | None = None
    ) -> None:
        """Allocates on the current stream, zeroed: 2 x (max_tokens + 1) x heads x D values per layer. num_layers: of
        the first decoder layers; None: of all. longest: tokens of a sequence at most; None: max_tokens.
        """
        self.padding_row = max_tokens
        self.longest = max_tokens if longest is None else longest
        sizes = decoder.key_sizes()
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = [
            tuple(  # type: ignore[misc]  # two, as sizes
                torch.zeros((max_tokens + 1, heads, dim), dtype=decoder.dtype, device=decoder.device)
                for heads, dim in sizes
            )
            for _ in range(num_layers or decoder.config.num_hidden_layers)
        ]

    def __len__(self) -> int:
        return self.padding_row + 1

    def step(self, begins: Sequence[int] | Mapping[int, int]) -> StepOfKeys:
        """For a step whose sequence i begins in row begins[i]."""
        return StepOfKeys(self, begins)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of a decoder layer: [len(self), heads, D] of keys, and of values."""
        return self._rows[layer]

    def write(
        self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put key, value [1, heads, T, D] of a decoder layer into `rows` [T] int64. Returns all: [1, heads, len(self),
        D].
        """
        for kept, new in zip(self._rows[layer], (key, value), strict=True):
            kept.index_copy_(0, rows, new[0].transpose(0, 1))
        keys, values = (kept.transpose(0, 1).unsqueeze(0) for kept in self._rows[layer])
        return keys, values


class StepOfKeys:
    """One step's use of StepKeys; stands in for a StepCache."""

    def __init__(self, keys: StepKeys, begins: Sequence[int] | Mapping[int, int]) -> None:
        self.keys, self.begins = keys, begins

    def of(self, packing: Packing) -> KeysOfMicrobatch:
        """The `past_key_values` of one microbatch."""
        assert packing.key_rows is not None  # made with this step's begins
        return KeysOfMicrobatch(self.keys, packing.key_rows)


class KeysOfMicrobatch:
    """What transformers' attention modules see as `past_key_values`."""

    def __init__(self, keys: StepKeys, rows: torch.Tensor) -> None:
        self._keys, self._rows = keys, rows

    @property
    def rows(self) -> torch.Tensor:
        """[T] int64: where the microbatch's tokens go."""
        return self._rows

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See StepKeys."""
        return self._keys.of_layer(layer)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value: [1, heads, T, D] of the microbatch. Returns the keys and values of all the step's tokens so far,
        in their rows.
        """
        return self._keys.write(layer_idx, self._rows, key, value)
