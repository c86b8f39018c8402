"""Request traces: when requests came and how long they were. Reads them, scales them and deals them out to ranks.

Two formats, told apart by the first character:
- CSV with a header that has at least `timestamp_ms,input_tokens,output_tokens`
- JSON lines as Mooncake publishes them: {"timestamp": ms, "input_length": ..., "output_length": ..., ...}
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipemoe.errors import InputError

_CSV_FIELDS = ("timestamp_ms", "input_tokens", "output_tokens")
_JSONL_FIELDS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    timestamp_ms: float  # arrival, after the trace's own zero
    input_tokens: int  # at least 1
    output_tokens: int  # at least 0


def read_trace(path: str | os.PathLike[str]) -> list[Request]:
    """All requests of the trace at `path`, in file order; InputError names file, line and value of the first bad one."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty; a trace has a header and at least one request")
    is_jsonl = text.lstrip().startswith("{")
    fields, rows = (_JSONL_FIELDS, _jsonl_rows(path, text)) if is_jsonl else (_CSV_FIELDS, _csv_rows(path, text))
    requests = [_request(f"{path}, line {line}", row, fields) for line, row in rows]
    if not requests:
        raise InputError(f"{path}: a header, but no request")
    return requests


def cut(requests: Sequence[Request], num_requests: int, first: int = 0) -> list[Request]:
    """`num_requests` of the trace from number `first` on, or as many as it has left (at least one)."""
    if num_requests < 1 or not 0 <= first < len(requests):
        raise InputError(
            f"cannot take {num_requests} requests from number {first} on: the trace has {len(requests)};"
            " take at least 1, from a number that it has"
        )
    return list(requests[first : first + num_requests])


def scale_lengths(requests: Sequence[Request], factor: float) -> list[Request]:
    """Input and output lengths times `factor`, rounded; inputs keep at least 1 token. Arrivals stay."""
    if not (math.isfinite(factor) and factor > 0):
        raise InputError(f"scale is {factor}; it must be a positive number")
    return [
        replace(
            request,
            input_tokens=max(1, round(request.input_tokens * factor)),
            output_tokens=round(request.output_tokens * factor),
        )
        for request in requests
    ]


def round_robin(requests: Sequence[Request], num_ranks: int) -> list[list[Request]]:
    """Request i goes to rank i mod `num_ranks`, as a data-parallel front end deals them; ranks may stay empty."""
    if num_ranks < 1:
        raise InputError(f"num_ranks is {num_ranks}; it must be at least 1")
    return [list(requests[rank::num_ranks]) for rank in range(num_ranks)]


def parse_rank_tokens(text: str, num_ranks: int) -> list[int]:
    """Tokens per rank from "4096,16,16,16"; one number per rank, 0 for a rank without requests."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"rank tokens {text!r}: must be whole numbers, separated by commas, such as 4096,16,16,16")
    if len(words) != num_ranks:
        raise InputError(f"rank tokens {text!r}: {len(words)} numbers for {num_ranks} ranks; give one for each")
    return [int(word) for word in words]


def rank_token_requests(rank_tokens: Sequence[int]) -> list[list[Request]]:
    """One request of `rank_tokens[r]` tokens at time 0 on rank r; none where that is 0."""
    return [[Request(0.0, tokens, 1)] if tokens else [] for tokens in rank_tokens]


def _csv_rows(path: str | os.PathLike[str], text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in _CSV_FIELDS if name not in header]
    if missing:
        raise InputError(f"{path}, line 1: no column {', '.join(missing)} in the header {','.join(header)!r}")
    reader.fieldnames = header
    for row in reader:
        yield reader.line_num, row


def _jsonl_rows(path: str | os.PathLike[str], text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, row_text in enumerate(text.splitlines(), start=1):
        if not row_text.strip():
            continue
        try:
            row = json.loads(row_text)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}): {row_text[:80]!r}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}: not an object: {row_text[:80]!r}")
        yield line, row


def _request(where: str, row: Mapping[str, Any], fields: tuple[str, str, str]) -> Request:
    timestamp, inputs, outputs = fields
    return Request(
        timestamp_ms=_number(where, row, timestamp, float, 0),
        input_tokens=int(_number(where, row, inputs, int, 1)),
        output_tokens=int(_number(where, row, outputs, int, 0)),
    )


def _number(where: str, row: Mapping[str, Any], name: str, kind: type[int] | type[float], least: int) -> float:
    value = row.get(name)
    wanted = f"{'a whole' if kind is int else 'a finite'} number, at least {least}"
    if value is None:
        raise InputError(f"{where}: no {name}; it must be {wanted}")
    try:
        # int() and float() would take True, and int() would cut 1.5
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        number = kind(value)
        if not (math.isfinite(number) and number >= least):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name} is {value!r}; it must be {wanted}") from None
    return number
