"""What a capture of CUDA graphs asks of the process around it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_held() -> Iterator[None]:
    """No cyclic garbage is collected inside: a tensor or graph that is freed in the middle of a capture makes it
    invalid.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
