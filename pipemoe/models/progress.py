"""What is read of a checkpoint, as it is read: a bar where someone may be looking, and GB/s in the log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

_log = logging.getLogger("pipemoe")


class Progress:
    """Counts bytes; a context manager. The bar is rank 0's, on a terminal."""

    def __init__(self, where: str, num_bytes: int) -> None:
        """where: "rank 0: ". num_bytes: that will be read, about."""
        self._where, self._total, self._read = where, num_bytes, 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if self._where.startswith("rank 0:") and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]  # comes with transformers

            self._bar = tqdm(total=self._total, desc="weights", unit="B", unit_scale=True, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        seconds = time.perf_counter() - self._begin
        size = self._read / 1e9
        _log.info("%sread %.3f GB in %.1f s, %.2f GB/s", self._where, size, seconds, size / seconds)

    def add(self, num_bytes: int) -> None:
        self._read += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
