"""The first tokens of sequences, from their logits."""

from __future__ import annotations

import math

import torch


def first_tokens(logits: torch.Tensor) -> torch.Tensor:
    """logits [sequences, V] -> [3, sequences] float64 on the host: the tokens, and the least and the largest logits.
    From a GPU they come once the current stream has come this far.
    """
    low, high = torch.aminmax(logits, dim=-1)  # NaN if any logit is
    first = torch.stack([found.double() for found in (logits.argmax(-1), low, high)])
    if not first.is_cuda:
        return first
    host = torch.empty(first.shape, dtype=first.dtype, device="cpu", pin_memory=True)
    return host.copy_(first, non_blocking=True)


def first_token(found: torch.Tensor, i: int) -> tuple[int, bool]:
    """Of sequence i, and whether its logits are finite. found: of `first_tokens`, once it is there."""
    token, low, high = found[:, i].tolist()
    return int(token), math.isfinite(low) and math.isfinite(high)
