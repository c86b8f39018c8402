"""The host's side of forward.py: a launch per call of attention, with nothing to set up for a new length or address.

    templates   tensor maps of queries, keys and values for one model, which blocks complete by addresses, strides and
                numbers of rows; made once
    workplace   of a stream: the counter of tiles, room for each block's own maps, and the launches, laid out once

Both are made at first calls, at set-up; a model's must not be one that a graph captures. Launches of one stream run one
after the other, and so must graphs that were captured on one stream.
"""

from __future__ import annotations

import math
import struct
from functools import cache

import torch

from pipemoe_kernels.attention.forward import attention_kernel
from pipemoe_kernels.attention.layout import ROWS
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.launch.packed_launch import PackedLaunch
from pipemoe_kernels.launch.tensor_map import MAP_BYTES, device_maps, heads_map
from pipemoe_kernels.ptx.attention import BOX_COLUMNS, KEYS

HEAD_SIZES = ((64, 64), (128, 128), (192, 128))  # of queries and keys, and of values
DTYPES = (torch.bfloat16, torch.float16)
MOST_SMS = 160  # more than any Hopper GPU has
STREAMS_AT_A_TIME = 16
# tiles of keys that a block multiplies, about 300 us; then another kernel may have its multiprocessor
BLOCK_LIMIT = 192
NEAR_BYTES = 20 << 20  # of keys and values that many blocks read at a time: they stay in 50 MB of L2 cache


def serves(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Can `attend` be called with these? On Hopper, for HEAD_SIZES, and heads and rows on 16-byte boundaries."""
    return (
        queries.is_cuda
        and queries.dtype in DTYPES
        and (queries.shape[2], values.shape[2]) in HEAD_SIZES
        and _capability(queries.device.index) == (9, 0)
        and all(_place(rows) is not None for rows in (queries, keys, values))
    )


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def heads_in_tile(num_heads: int, num_key_heads: int) -> int:
    """Query heads whose rows make up a tile: all of a key head where they divide its rows, else one."""
    group = num_heads // num_key_heads
    return group if ROWS % group == 0 else 1


class _Workplace:
    """Of one stream. maps: where its blocks put theirs. counters: of tiles taken and of blocks that have ended; 0
    between launches.
    """

    def __init__(self, memory: torch.Tensor):
        self.maps = memory[: MOST_SMS * 3 * MAP_BYTES]
        self.counters = memory[len(self.maps) :]
        self.launches: dict[tuple, PackedLaunch] = {}


class _Workplaces:
    """Of a device's streams. Memory is taken for many at a time: none can be taken while a graph captures."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of_stream: dict[int, _Workplace] = {}
        self._free: list[torch.Tensor] = []

    def __getitem__(self, stream: int) -> _Workplace:
        found = self._of_stream.get(stream)
        if found is None:
            if not self._free:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("attention's first call on a stream must not be one that a graph captures")
                size = MOST_SMS * 3 * MAP_BYTES + MAP_BYTES
                self._free = list(torch.zeros((STREAMS_AT_A_TIME, size), dtype=torch.uint8, device=self._device))
                torch.cuda.synchronize(self._device)  # other streams will use it
            found = self._of_stream[stream] = _Workplace(self._free.pop())
        return found


@cache
def _workplaces(device_index: int) -> _Workplaces:
    return _Workplaces(torch.device("cuda", device_index))


_templates: dict[tuple, torch.Tensor] = {}


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    *,
    max_key: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed pieces on the current stream: [T, Hq, Dv], into `out` if given.

    queries [T, Hq, D], keys [S, Hkv, D], values [S, Hkv, Dv]: see `serves`. query_offsets, key_offsets [B + 1] int32:
    where pieces begin. key_lengths [B] int32: how many keys each has; None: all up to the next one's. A piece's last
    query sees all its keys, or the last `window` of them. max_key: at least the keys of the longest piece.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_keys, num_key_heads, value_dim = values.shape
    if out is None:
        out = torch.empty((num_tokens, num_heads, value_dim), dtype=queries.dtype, device=queries.device)
    if num_tokens == 0:
        return out
    stream = Stream.current(queries.device)
    workplace = _workplaces(stream.device_index)[stream.handle]
    layout = (queries.dtype, num_heads, num_key_heads, head_dim, value_dim, window is not None)
    launch = workplace.launches.get(layout)
    if launch is None:
        launch = workplace.launches[layout] = _laid_out(stream, workplace, queries, keys, values, window is not None)
    group = heads_in_tile(num_heads, num_key_heads)
    num_sets, num_pieces = num_heads // group, len(query_offsets) - 1
    together = max(1, min(num_sets, NEAR_BYTES // (max(max_key, KEYS) * (head_dim + value_dim) * 2)))
    most_tiles = (num_tokens * group // ROWS + num_pieces) * num_sets
    most_steps = most_tiles * -(-max(1, min(max_key, num_keys)) // KEYS)
    num_first = min(_num_sms(stream.device_index), most_tiles)
    launch.values[2:] = (
        *(*_place(queries), num_tokens, *_place(keys), *_place(values), num_keys),
        *(query_offsets.data_ptr(), key_offsets.data_ptr(), 0 if key_lengths is None else key_lengths.data_ptr()),
        *(num_pieces, num_sets, num_sets // num_key_heads, together, _bits(scale * math.log2(math.e)), window or 0),
        *(num_first, BLOCK_LIMIT, workplace.counters.data_ptr(), *_place(out)),
    )
    launch(stream.handle, num_first + most_steps // BLOCK_LIMIT)
    return out


def _place(rows: torch.Tensor) -> tuple[int, int, int] | None:
    """Address, and bytes from a row to the next and from a head to the next; None if the copy engine cannot read so."""
    row, head, column = rows.stride()
    if rows.shape[1] == 1:
        head = row  # may be anything
    address = rows.data_ptr()
    return (address, 2 * row, 2 * head) if column == 1 and (address | 2 * row | 2 * head) % 16 == 0 else None


def _bits(value: float) -> int:
    """A float32's."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _laid_out(
    stream: Stream,
    workplace: _Workplace,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    windowed: bool,
) -> PackedLaunch:
    """A launch for rows of these heads; all but its first two arguments come with each call."""
    (_, num_heads, head_dim), (_, num_key_heads, value_dim) = queries.shape, values.shape
    assert keys.shape == (*values.shape[:2], head_dim) and num_heads % num_key_heads == 0, (keys.shape, values.shape)
    assert queries.dtype == keys.dtype == values.dtype
    group = heads_in_tile(num_heads, num_key_heads)
    kernel = attention_kernel(head_dim, value_dim, group, half=queries.dtype == torch.float16, windowed=windowed)
    key = (stream.device_index, queries.dtype, num_heads, num_key_heads, head_dim, value_dim)
    if key not in _templates:
        boxes = ((queries, group, ROWS // group), (keys, 1, KEYS), (values, 1, KEYS))
        maps = [heads_map(rows, BOX_COLUMNS, heads, box_rows) for rows, heads, box_rows in boxes]
        _templates[key] = device_maps(maps, queries.device)
    later = [0] * (len(kernel.parameters) - 2)
    return kernel.pack(stream.device_index, _templates[key], workplace.maps, *later)
