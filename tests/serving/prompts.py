"""Prompts for the engine of these tests, and how much that takes."""

from __future__ import annotations

import torch

from tests.models.tiny import VOCAB

WAIT = 60  # seconds for what comes at once; a test that waits for nothing ends here
STEP_TOKENS, KEPT_TOKENS = 16, 160


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
