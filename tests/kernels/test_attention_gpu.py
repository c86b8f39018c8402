"""Attention over packed pieces against float64, one softmax per query; sizes that do not fit tiles, NaN behind them."""

import importlib.util
import random

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.attention import packed
from pipemoe_kernels.attention.packed import attend

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the largest value


class Pieces:
    """Queries, keys and values of pieces, with `gap` rows of NaN behind each piece's keys."""

    def __init__(
        self, queries, keys=None, *, heads=(8, 1), dims=(128, 128), dtype=torch.bfloat16, gap=0, scale=0.09, seed=1
    ):
        keys = queries if keys is None else keys
        generator = torch.Generator().manual_seed(seed)
        self.num_queries, self.num_keys, self.scale, self.gap = list(queries), list(keys), scale, gap
        self.query_starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        self.key_starts = [sum(keys[:i]) + gap * i for i in range(len(keys) + 1)]

        def rows(count, num_heads, dim):
            return torch.randn((count, num_heads, dim), generator=generator).to(dtype).cuda()

        self.queries = rows(self.query_starts[-1], heads[0], dims[0])
        self.keys, self.values = (rows(self.key_starts[-1], heads[1], dim) for dim in dims)
        for start, count in zip(self.key_starts, keys):
            self.keys[start + count : start + count + gap] = torch.nan
            self.values[start + count : start + count + gap] = torch.nan

    def attend(self, window=None, out=None):
        offsets = [torch.tensor(o, dtype=torch.int32).cuda() for o in (self.query_starts, self.key_starts)]
        lengths = torch.tensor(self.num_keys, dtype=torch.int32).cuda() if self.gap else None
        return attend(
            self.queries,
            self.keys,
            self.values,
            *offsets,
            max_key=max(self.num_keys),
            scale=self.scale,
            key_lengths=lengths,
            window=window,
            out=out,
        )

    def expected(self, window=None):
        """[T, Hq, Dv] float64."""
        group = self.queries.shape[1] // self.keys.shape[1]
        out = torch.zeros((*self.queries.shape[:2], self.values.shape[2]), dtype=torch.float64, device="cuda")
        for q, k, n, m in zip(self.query_starts, self.key_starts, self.num_queries, self.num_keys):
            row, column = torch.arange(n, device="cuda")[:, None] + m - n, torch.arange(m, device="cuda")
            seen = (column <= row) & (column > row - (window or m + n + 1))
            for head in range(self.queries.shape[1]):
                keys, values = (t[k : k + m, head // group].double() for t in (self.keys, self.values))
                scores = self.queries[q : q + n, head].double() @ keys.T * self.scale
                out[q : q + n, head] = scores.masked_fill(~seen, -torch.inf).softmax(1).nan_to_num(0) @ values
        return out

    def check(self, window=None):
        out = torch.full((*self.queries.shape[:2], self.values.shape[2]), torch.nan, device="cuda").to(
            self.queries.dtype
        )
        assert self.attend(window, out) is out
        want = self.expected(window)
        assert bool(out.isfinite().all())
        if out.numel():
            error = (out.double() - want).abs().max().item()
            assert error <= TOLERANCE[out.dtype] * max(want.abs().max().item(), 0.1), error


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 4097])
def test_one_piece(length):
    Pieces([length]).check()


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (16, 2), (14, 2), (32, 4), (6, 1), (128, 1)])
def test_groups_of_heads(heads):
    """Also such as do not divide a tile's rows."""
    Pieces([300, 41, 129], heads=heads).check()


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(dims, dtype):
    Pieces([600, 41, 128], heads=(4, 4), dims=dims, dtype=dtype).check()


@pytest.mark.parametrize("gap", [0, 1, 37, 200])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 1000])
def test_packs(gap, window):
    """Pieces without tokens, pieces with earlier keys, and pieces of one token, in one pack."""
    Pieces([100, 0, 200, 1, 5, 130, 0, 0], [500, 0, 200, 700, 1029, 130, 0, 0], gap=gap).check(window)


def test_more_queries_than_keys():
    """The first ones see no key."""
    Pieces([300, 10], [100, 0], gap=3).check()


def test_many_pieces():
    lengths = [random.Random(1).randrange(0, 40) for _ in range(133)]
    Pieces(lengths).check()


def test_large_scores():
    """Maxima that grow past the threshold of rescaling, rows of equal scores, and of one score far above all others."""
    pieces = Pieces([700, 300], scale=3.0)
    pieces.keys[::2] *= 4
    pieces.queries[100:120] = 0
    pieces.keys[650] *= 50
    pieces.check()


@pytest.mark.parametrize("window", [None, 200])
def test_rows_do_not_depend_on_their_neighbours(window):
    """The same bits alone and in a pack, also where a neighbour's values are NaN."""
    lengths = [333, 1, 1000, 64]
    pack = Pieces(lengths, heads=(8, 2))
    together = pack.attend(window)
    for i, length in enumerate(lengths):
        alone = Pieces([length], heads=(8, 2))
        rows = slice(pack.query_starts[i], pack.query_starts[i + 1])
        alone.queries, alone.keys, alone.values = pack.queries[rows], pack.keys[rows], pack.values[rows]
        assert torch.equal(alone.attend(window), together[rows])
    third = slice(pack.query_starts[2], pack.query_starts[3])
    pack.values[third] = torch.nan
    poisoned = pack.attend(window)
    assert bool(poisoned[third].isnan().any())
    poisoned[third] = together[third]
    assert torch.equal(poisoned, together)


def test_strides():
    """Queries, keys and values as columns of one matrix, as a fused product leaves them."""
    pieces = Pieces([150, 70], heads=(8, 2))
    whole = torch.cat([t.flatten(1) for t in (pieces.queries, pieces.keys, pieces.values)], dim=1)
    parts = whole.split([8 * 128, 2 * 128, 2 * 128], dim=1)
    pieces.queries, pieces.keys, pieces.values = (part.unflatten(1, (-1, 128)) for part in parts)
    assert not pieces.queries.is_contiguous()
    pieces.check()


def test_nothing_is_built_or_allocated_for_another_length(monkeypatch):
    """After the first call of a layout: no kernel, no map, no workplace, and no memory but the result's."""
    Pieces([7]).attend()
    for name in ("attention_kernel", "device_maps", "_Workplaces", "_laid_out"):
        monkeypatch.setattr(packed, name, None)
    lengths = [random.Random(2).randrange(1, 3000) for _ in range(30)]
    made = [Pieces([length]) for length in lengths]
    torch.cuda.synchronize()
    for pieces in made:
        out = torch.empty_like(pieces.queries)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        offsets = torch.tensor(pieces.query_starts, dtype=torch.int32).cuda()
        attend(pieces.queries, pieces.keys, pieces.values, offsets, offsets, max_key=1, scale=1.0, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] <= before + 1  # the offsets


def test_a_graph_serves_other_pieces():
    """Captured with one piece of 512 rows and room for 4; replayed with others, then as it was."""
    pieces = Pieces([512])
    offsets = torch.tensor([0, 512, 512, 512, 512], dtype=torch.int32).cuda()
    out = torch.zeros_like(pieces.queries)

    def call():
        attend(pieces.queries, pieces.keys, pieces.values, offsets, offsets, max_key=512, scale=pieces.scale, out=out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    for ends in ([100, 101, 400, 400], [512, 512, 512, 512], [1, 200, 300, 512]):
        offsets[1:].copy_(torch.tensor(ends, dtype=torch.int32))
        other = Pieces([b - a for a, b in zip([0, *ends], ends)])
        other.queries, other.keys, other.values = pieces.queries, pieces.keys, pieces.values
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[: ends[-1]], other.attend()[: ends[-1]])


def test_streams_side_by_side():
    """Each has its own counter and maps."""
    pieces = [Pieces([900], seed=s) for s in range(3)]
    wanted = [p.attend() for p in pieces]
    streams = [torch.cuda.Stream() for _ in pieces]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for p, stream in zip(pieces, streams):
            with torch.cuda.stream(stream):
                found.append(p.attend())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
