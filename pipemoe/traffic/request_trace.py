"""Request traces: when requests came and how long they were. Reads, scales and deals them out to ranks.

Formats, told apart by the first character and by the header:
- CSV with a header that has at least `timestamp_ms` or `timestamp_s`, `input_tokens` and `output_tokens`
- CSV as Azure publishes it: TIMESTAMP (date and time of day), ContextTokens, GeneratedTokens
- CSV as BurstGPT publishes it: Timestamp (in seconds), Request tokens, Response tokens, and others
- JSON lines as Mooncake publishes them: {"timestamp": ms, "input_length": ..., "output_length": ..., ...}

Others write JSON lines under the same names with times in seconds. Read as milliseconds, they would be a thousand times
too dense. So a trace of more than a thousand requests a second is refused until its unit is said.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipemoe.errors import InputError

_DATE = "a date"  # the unit of times such as 2023-11-16 18:15:46.68
# Of each form of CSV: the columns of time, input and output tokens, and the unit of the time.
_CSV_FORMS = (
    (("timestamp_ms", "input_tokens", "output_tokens"), "ms"),
    (("timestamp_s", "input_tokens", "output_tokens"), "s"),
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _DATE),
    (("Timestamp", "Request tokens", "Response tokens"), "s"),
)
_JSONL_FIELDS = ("timestamp", "input_length", "output_length")
UNITS = {"ms": 1.0, "s": 1000.0}  # in ms
_DENSE_MS = 1.0  # between requests, on average; denser traces need their unit said
_ENOUGH = 100  # requests of a CSV trace (its column says the unit) before that holds
_MOST_TOKENS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    timestamp_ms: float  # arrival, after the trace's own zero
    input_tokens: int  # at least 1
    output_tokens: int  # at least 0


def read_trace(path: str | os.PathLike[str], unit: str | None = None) -> list[Request]:
    """All requests of the trace at `path`, in order of time. InputError names file, line and value of the first bad
    one.

    unit: of its times, "ms" or "s"; None: as the format says, unless the times are too dense for that.
    """
    if unit is not None and unit not in UNITS:
        raise InputError(f"the unit of a trace's times is {unit!r}; it must be one of {', '.join(UNITS)}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty; a trace has a header and at least one request")
    is_jsonl = text.lstrip().startswith("{")
    if is_jsonl:
        fields, written, rows = _JSONL_FIELDS, "ms", _jsonl_rows(path, text)
    else:
        (fields, written), rows = _csv_rows(path, text)
        if unit not in (None, written):
            raise InputError(
                f"{path}, line 1: the column {fields[0]} says its unit, which is not {unit}; name the column "
                f"timestamp_{unit}, or leave the unit out"
            )
    requests: list[Request] = []
    first: datetime | None = None  # of dates
    for line, row in rows:
        where = f"{path}, line {line}"
        if written == _DATE:
            date = _date(where, row, fields[0])
            first = first or date
            time_ms = (date - first) / timedelta(milliseconds=1)
        else:
            time_ms = _number(where, row, fields[0], float, 0) * UNITS[unit or written]
        request = _request(where, row, fields, time_ms)
        if requests and request.timestamp_ms < requests[-1].timestamp_ms:
            raise InputError(
                f"{path}, line {line}: {fields[0]} is {row[fields[0]]}, which is before that of the request before; "
                "sort the trace by time"
            )
        requests.append(request)
    if not requests:
        raise InputError(f"{path}: a header, but no request")
    span_ms = requests[-1].timestamp_ms - requests[0].timestamp_ms
    if unit is None and len(requests) >= (2 if is_jsonl else _ENOUGH) and 0 < span_ms < _DENSE_MS * len(requests):
        raise InputError(
            f"{path}: {len(requests)} requests within {span_ms:g} ms, if {fields[0]} is in {written}. If it is in "
            "seconds, say so with --trace-unit s (in CSV: a column timestamp_s); if they do come as fast as that, with "
            f"--trace-unit {written}"
        )
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


TOO_LONG = ("error", "clip", "drop")


def fit_lengths(requests: Sequence[Request], most: int, too_long: str = "error") -> tuple[list[Request], int]:
    """The requests, with at most `most` input tokens each, and how many had more.

    too_long: what becomes of those: InputError, cut to `most`, or left out (InputError if none is left).
    """
    if too_long not in TOO_LONG:
        raise InputError(f"too_long is {too_long!r}; it must be one of {', '.join(TOO_LONG)}")
    longer = [request.input_tokens for request in requests if request.input_tokens > most]
    if longer and too_long == "error":
        raise InputError(
            f"{len(longer)} of {len(requests)} requests have more than {most} input tokens, up to {max(longer)}; "
            "--too-long clip cuts them, --too-long drop leaves them out"
        )
    if too_long == "drop":
        fitting = [request for request in requests if request.input_tokens <= most]
        if not fitting:
            raise InputError(f"all {len(requests)} requests have more than {most} input tokens, so none is left")
        return fitting, len(longer)
    return [replace(request, input_tokens=min(request.input_tokens, most)) for request in requests], len(longer)


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


def _csv_rows(
    path: str | os.PathLike[str], text: str
) -> tuple[tuple[tuple[str, str, str], str], Iterator[tuple[int, Mapping[str, Any]]]]:
    """The form, one of _CSV_FORMS, and the rows with their lines."""
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    header = [name.strip() for name in _read_csv(path, reader, lambda: reader.fieldnames) or ()]
    forms = [form for form in _CSV_FORMS if form[0][0] in header]
    shown = f"the header {','.join(header)[:200]!r}"
    if not forms:
        known = "; ".join(", ".join(fields) for fields, _ in _CSV_FORMS)
        missing = [name for name in _CSV_FORMS[0][0] if name not in header]
        raise InputError(
            f"{path}, line 1: no column {', '.join(missing)} in {shown}; a header has the columns of one of these "
            f"forms: {known}"
        )
    missing = [name for name in forms[0][0] if name not in header]
    if missing:
        raise InputError(f"{path}, line 1: no column {', '.join(missing)} in {shown}")
    twice = [name for name in forms[0][0] if header.count(name) > 1]
    if twice or len(forms) > 1:
        found = f"{twice[0]} twice" if twice else " and ".join(fields[0] for fields, _ in forms)
        raise InputError(f"{path}, line 1: {shown} has {found}; one is wanted")
    reader.fieldnames = header

    def rows() -> Iterator[tuple[int, Mapping[str, Any]]]:
        while (row := _read_csv(path, reader, lambda: next(reader, None))) is not None:
            yield reader.line_num, row

    return forms[0], rows()


def _read_csv(path: str | os.PathLike[str], reader: csv.DictReader, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except csv.Error as error:  # such as a field without an end
        raise InputError(f"{path}, line {reader.line_num + 1}: not CSV: {error}") from error


def _jsonl_rows(path: str | os.PathLike[str], text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, row_text in enumerate(text.splitlines(), start=1):
        if not row_text.strip():
            continue
        try:
            row = json.loads(row_text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}): {row_text[:80]!r}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}: not an object: {row_text[:80]!r}")
        yield line, row


def _request(where: str, row: Mapping[str, Any], fields: tuple[str, str, str], time_ms: float) -> Request:
    _, inputs, outputs = fields
    tokens = [int(_number(where, row, name, int, least)) for name, least in ((inputs, 1), (outputs, 0))]
    for name, count in zip((inputs, outputs), tokens):
        if count > _MOST_TOKENS:
            raise InputError(f"{where}: {name} is {row[name]!r}; no request has more than {_MOST_TOKENS} tokens")
    return Request(time_ms, *tokens)


def _date(where: str, row: Mapping[str, Any], name: str) -> datetime:
    """UTC, unless it says otherwise. Digits behind microseconds are cut off."""
    value = row.get(name)
    try:
        date = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise InputError(
            f"{where}: {name} is {value!r}; it must be a date and time such as 2023-11-16 18:15:46.68"
        ) from None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _number(where: str, row: Mapping[str, Any], name: str, kind: type[int] | type[float], least: int) -> float:
    value = row.get(name)
    wanted = f"{'a whole' if kind is int else 'a finite'} number, at least {least}"
    if value is None:
        raise InputError(f"{where}: no {name}; it must be {wanted}")
    try:
        # int() and float() would take True, and int() would cut 1.5.
        if (
            isinstance(value, bool)
            or (kind is int and isinstance(value, float))
            or (isinstance(value, str) and "_" in value)
        ):
            raise ValueError
        number = kind(value)
        if not (math.isfinite(number) and number >= least):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name} is {value!r}; it must be {wanted}") from None
    return number
