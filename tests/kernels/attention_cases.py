"""Float64 oracles of the attention kernels, and checks that the simulator and a GPU share."""

from __future__ import annotations

import torch

from pipemoe_kernels.attention.heads import HeadForm, heads_kernel, interleaved_tables, place_heads
from pipemoe_kernels.attention.latents import LatentShape, join_keys, norm_latents, rotate_queries
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


def check_latents(
    num_tokens: int, num_heads: int, shape: LatentShape, dtype: torch.dtype, device: str, stream: Stream
) -> None:
    """All three kernels, on rows that are parts of larger ones."""

    def given(*sizes, seed, wide=0):
        return random(*sizes, dtype=dtype, device=device, seed=seed, wide=wide)

    rows = given(num_tokens, shape.query + shape.rank + shape.position, seed=1, wide=8)
    query, latent, position = rows.cpu().double().split([shape.query, shape.rank, shape.position], dim=1)
    angles = 50 * torch.rand(num_tokens, shape.position // 2, generator=torch.Generator().manual_seed(2))
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    tables = interleaved_tables(cos, sin) if shape.interleaved else (cos, sin)
    weights = [1 + 0.1 * given(width, seed=seed) for seed, width in ((3, shape.query), (4, shape.rank))]
    places = torch.randperm(num_tokens + 5, generator=torch.Generator().manual_seed(5))[:num_tokens]
    kept = [
        torch.full((num_tokens + 5, width), torch.nan, dtype=dtype, device=device)
        for width in (shape.rank, shape.position)
    ]
    query_weight = weights[0] if shape.has_query_norm else None
    norm_latents(stream, rows, query_weight, weights[1], EPS, *tables, places.to(device), *kept, shape)
    form = HeadForm(shape.position, shape.position, shape.interleaved)
    wanted = oracle_norm(latent, weights[1]), oracle_rotated(position[:, None], cos, sin, form)[:, 0]
    found = rows.cpu().split([shape.query, shape.rank, shape.position], dim=1)
    near(found[0], oracle_norm(query, weights[0]) if shape.has_query_norm else query)
    for k, mine, want in zip(kept, found[1:], wanted, strict=True):
        near(mine, want)
        assert torch.equal(k.cpu()[places], mine)
        others = torch.ones(len(k), dtype=torch.bool)
        others[places] = False
        assert bool(k.cpu()[others].isnan().all())

    queries = given(num_tokens, num_heads * (shape.nope + shape.position), seed=6, wide=16)
    heads = queries.cpu().double().unflatten(1, (num_heads, -1))
    rotate_queries(stream, queries, *tables, shape)
    near(
        queries.cpu().unflatten(1, (num_heads, -1)),
        torch.cat((heads[..., : shape.nope], oracle_rotated(heads[..., shape.nope :], cos, sin, form)), dim=2),
    )

    expanded = given(num_tokens, num_heads * (shape.nope + shape.value), seed=7, wide=8)
    keys = torch.full((num_tokens, num_heads, shape.nope + shape.position), torch.nan, dtype=dtype, device=device)
    positions = rows[:, shape.query + shape.rank :]
    join_keys(stream, expanded, positions, keys, shape)
    assert torch.equal(keys[..., : shape.nope], expanded.unflatten(1, (num_heads, -1))[..., : shape.nope])
    assert torch.equal(keys[..., shape.nope :], positions[:, None].expand(-1, num_heads, -1))
