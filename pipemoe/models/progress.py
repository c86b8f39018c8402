"""A bar that says how far loading is; on rank 0, and only where someone may be looking."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Counts bytes; a context manager."""

    def __init__(self, num_bytes: int, where: str) -> None:
        self._bar: Any = None
        if where.startswith("rank 0") and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]  # comes with transformers

            self._bar = tqdm(total=num_bytes, desc="weights", unit="B", unit_scale=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(num_bytes)
