"""Products with a layer's weights, by our kernel for few rows or by the library, in calls that a warm-up has run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FEW_ROWS = 16  # for which our own products are the faster ones
FINE_ROWS = 1024  # up to here a warm-up runs every number of rows
MOST_ROWS = 8 * FINE_ROWS  # of one call of the library


def fuse(linears: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights [sum of outputs, H] and biases of several nn.Linear of the same input, one behind another. The modules'
    own become views of them.
    """

    def together(name: str) -> torch.Tensor:
        found = [getattr(linear, name) for linear in linears]
        parts = [linear.weight.new_zeros(len(linear.weight)) if p is None else p for linear, p in zip(linears, found)]
        whole = torch.cat([part.detach() for part in parts])
        for linear, old, view in zip(linears, found, whole.split([len(part) for part in parts])):
            if old is not None:
                setattr(linear, name, torch.nn.Parameter(view, requires_grad=False))
        return whole

    return together("weight"), together("bias") if any(linear.bias is not None for linear in linears) else None


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, H], weight [N, H], bias [N] or None -> [T, N] of x's dtype, or without a bias of another `dtype`."""
    parts = row_parts(len(x))
    if len(parts) == 1:
        return _product(x, weight, bias, dtype)
    out = x.new_empty((len(x), len(weight)), dtype=dtype or x.dtype)
    for part in parts:
        _product(x[part], weight, bias, dtype, out[part])
    return out


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """In one call; into `out` if there is one."""
    if bias is not None or not takes_few_rows(x, weight):
        return library_product(x, weight, bias, dtype, out)
    from pipemoe_kernels.gemm.few import few_rows
    from pipemoe_kernels.launch.kernel import Stream

    if out is None:
        out = torch.empty((len(x), len(weight)), dtype=dtype or x.dtype, device=x.device)
    few_rows(Stream.current(x.device), x, weight, out)
    return out


def library_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `product`, in one call of the library; into `out` if there is one. At most MOST_ROWS rows (see row_parts)."""
    for num_rows in missing_counts(x, weight, dtype, bias is None):
        library_product(x[:num_rows], weight, bias, dtype)
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), out=out)
    if dtype in (None, x.dtype):
        return torch.mm(x, weight.t(), out=out)
    found = torch.mm(x, weight.t(), out_dtype=dtype)
    return found if out is None else out.copy_(found)


def add_product(hidden: torch.Tensor, heads: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """hidden [T, H] += heads [T, heads, D] as rows, times weight [H, heads D], + bias [H]."""
    x = heads.flatten(1)
    parts = row_parts(len(x))
    if len(parts) == 1:  # views cost the host time
        _add_product(hidden, x, weight)
    else:
        for part in parts:
            _add_product(hidden[part], x[part], weight)
    if bias is not None:
        hidden.add_(bias)


def _add_product(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """In one call."""
    if takes_few_rows(x, weight):
        from pipemoe_kernels.gemm.few import few_rows
        from pipemoe_kernels.launch.kernel import Stream

        few_rows(Stream.current(x.device), x, weight, hidden, adds=True)
    else:
        add_library_product(hidden, x, weight)


def add_library_product(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """hidden [T, H] += x [T, N] times weight [H, N], in one call of the library. At most MOST_ROWS rows."""
    for num_rows in missing_counts(x, weight, "added"):
        hidden[:num_rows].clone().addmm_(x[:num_rows], weight.t())
    hidden.addmm_(x, weight.t())


def row_parts(num_rows: int, fine: int | None = None, most: int | None = None) -> list[slice]:
    """Rows for each call of the library: at most `fine` (None: FINE_ROWS), or a multiple of it up to `most` (None:
    MOST_ROWS). At least one part.

    For other numbers of rows the library takes other kernels. The driver loads a kernel when it is first launched, and
    waits until the GPU runs nothing else (findings/cublas_first_use_waits.sh). A collective of the other slot may run
    that long: it waits for a peer, which may wait for this very launch. Then all stand still. So a warm-up runs all
    numbers of rows that parts have: those up to FINE_ROWS by `counts_filled`.
    """
    fine, most = fine or FINE_ROWS, most or MOST_ROWS
    whole = num_rows // fine * fine
    bounds = [*range(0, whole, most), whole]
    if whole != num_rows or not whole:
        bounds.append(num_rows)
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]


_filling: dict[Hashable, int] | None = None  # see counts_filled


@contextmanager
def counts_filled(run: dict[Hashable, int]) -> Iterator[None]:
    """Meanwhile a product of up to FINE_ROWS rows runs for all smaller numbers of rows as well, from the largest for
    which its kind has run. run: that number, by kind of product; empty at first. On one thread at a time.
    """
    global _filling
    _filling = run
    try:
        yield
    finally:
        _filling = None


def missing_counts(x: torch.Tensor, weight: torch.Tensor, *kind: Hashable) -> range:
    """Numbers of rows, fewer than x has, for which the caller shall run a product of this kind first; mostly none."""
    if _filling is None or len(x) > FINE_ROWS:
        return range(0)
    key = weight.shape, weight.dtype, x.stride(0), *kind
    run = _filling.get(key, 0)
    _filling[key] = max(run, len(x))
    return range(run + 1, len(x))


def row_counts(most: int) -> list[int]:
    """Numbers of rows up to `most`: each up to 20 (a round has no more sequences), every eighth up to 64, then four per
    doubling. Among these are all sizes of parts of over FINE_ROWS (see row_parts).
    """
    counts, step = [*range(1, 21), *range(24, 65, 8)], 16
    while counts[-1] < most:
        counts += [counts[-1] + step * i for i in range(1, 5)]
        step *= 2
    return [*(count for count in counts if count < most), most]


def takes_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Is there a kernel for so few rows x, which is faster than the library's?"""
    if len(x) > FEW_ROWS:
        return False
    from pipemoe_kernels.gemm.few import fits
    from pipemoe_kernels.launch.kernel import is_hopper

    return is_hopper(x.device.index) and fits(x, weight)
