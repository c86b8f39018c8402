"""Float64 oracles of the attention kernels, and checks that the simulator and a GPU share."""

from __future__ import annotations

import torch

from pipemoe_kernels.attention.heads import HeadForm, heads_kernel, interleaved_tables, place_heads
from pipemoe_kernels.attention.norm import norm_kernel, norm_rows
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.placed_rows import PlacedRows

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # half a unit in the last place
EPS = 1e-6


def near(found: torch.Tensor, wanted: torch.Tensor, roundings: float = 1.0, floor: float = 1e-3) -> None:
    """Assert that every value is off by no more than some roundings to its format, or of `floor`."""
    bound = roundings * ROUNDING[found.dtype] * wanted.abs().clamp(min=floor) * (1 + 1e-3)
    off = (found.cpu().double() - wanted).abs()
    assert bool((off <= bound).all()), (off - bound).max()


def random(*shape: int, dtype: torch.dtype, device: str, seed: int, wide: int = 0) -> torch.Tensor:
    """Normal values; `wide`: as the first columns of rows that are longer by so many NaN."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if wide:
        values = torch.nn.functional.pad(values, (0, wide), value=torch.nan)
    return values.to(device)[..., : shape[-1]]


def oracle_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    x = x.cpu().double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.cpu().double()


def check_norm(
    num_tokens: int,
    hidden: int,
    dtype: torch.dtype,
    sums_dtype: torch.dtype | None,
    device: str,
    stream: Stream,
    *,
    placed: bool = False,
    copied: bool = True,
    threads: int = 0,
) -> None:
    """With placed rows, the last two tokens are padding."""
    x = random(num_tokens, hidden, dtype=dtype, device=device, seed=1, wide=8)
    before, weight = x.cpu().double(), 1 + 0.1 * random(hidden, dtype=dtype, device=device, seed=2)
    sums = None
    if sums_dtype is not None:
        sums = random(num_tokens, hidden, dtype=sums_dtype, device=device, seed=3, wide=16)
        before += sums.cpu().double()
    out = torch.full((num_tokens, hidden + 16), torch.nan, dtype=dtype, device=device)
    row_bytes = 2 * hidden + 128
    wire = torch.full((num_tokens + 2, row_bytes), 0xAB, dtype=torch.uint8, device=device)
    num_placed = max(0, num_tokens - 2)
    place = torch.tensor([wire.data_ptr() + row_bytes, num_placed], device=device) if placed else None
    kernel = norm_kernel(dtype, sums_dtype, hidden, EPS, placed, copied, threads) if threads else None
    rows = PlacedRows(place, row_bytes) if placed else None
    norm_rows(stream, x, sums, weight, EPS, out[:, :hidden] if copied else None, rows, kernel)
    near(x, before)
    wanted = oracle_norm(x, weight)
    if copied:
        near(out[:, :hidden], wanted)
    assert out[:, hidden if copied else 0 :].isnan().all()
    if placed:
        near(wire[1 : num_placed + 1, : 2 * hidden].view(dtype), wanted[:num_placed])
        wire[1 : num_placed + 1, : 2 * hidden] = 0xAB
    assert bool((wire == 0xAB).all())


def oracle_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: HeadForm) -> torch.Tensor:
    """x [T, heads, D] float64; cos, sin [T, rotary / 2] of each pair."""
    cos, sin = cos.cpu().double()[:, None], sin.cpu().double()[:, None]
    out, half = x.clone(), form.rotary // 2
    first = slice(0, form.rotary, 2) if form.interleaved else slice(0, half)
    second = slice(1, form.rotary, 2) if form.interleaved else slice(half, form.rotary)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def check_heads(
    num_tokens: int,
    num_query: int,
    num_key: int,
    form: HeadForm,
    dtype: torch.dtype,
    device: str,
    stream: Stream,
    threads: int = 0,
) -> None:
    """Keys and values go to scattered rows; all others stay as they were."""
    dim, width = form.head_dim, (num_query + 2 * num_key) * form.head_dim
    qkv = random(num_tokens, width, dtype=dtype, device=device, seed=1, wide=8)
    before = qkv.cpu().double().unflatten(1, (-1, dim))
    angles = 50 * torch.rand(num_tokens, form.rotary // 2, generator=torch.Generator().manual_seed(2))
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    weights = [1 + 0.1 * random(dim, dtype=dtype, device=device, seed=seed) for seed in (3, 4)]
    num_rows = num_tokens + 5
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(5))[:num_tokens]
    kept = [torch.full((num_rows, num_key, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    tables = interleaved_tables(cos, sin) if form.interleaved else (cos, sin)
    norms = (weights[0], weights[1]) if form.eps is not None else None
    kernel = heads_kernel(dtype, form, threads) if threads else None
    place_heads(stream, qkv, num_query, *tables, norms, rows.to(device), *kept, form, kernel)
    query, key, value = before.split([num_query, num_key, num_key], dim=1)
    if form.eps is not None:
        query, key = oracle_norm(query, weights[0], form.eps), oracle_norm(key, weights[1], form.eps)
    query, key = (oracle_rotated(x, cos, sin, form) for x in (query, key))
    found = qkv.cpu().unflatten(1, (-1, dim))
    near(found[:, :num_query], query)
    assert torch.equal(found[:, num_query:].double(), before[:, num_query:])
    near(kept[0][rows], key)
    assert torch.equal(kept[1].cpu()[rows].double(), value)
    others = torch.ones(num_rows, dtype=torch.bool)
    others[rows] = False
    assert all(bool(k.cpu()[others].isnan().all()) for k in kept)
