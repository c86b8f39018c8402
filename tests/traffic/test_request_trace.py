from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipemoe.errors import InputError
from pipemoe.traffic.request_trace import (
    Request,
    cut,
    parse_rank_tokens,
    rank_token_requests,
    read_trace,
    round_robin,
    scale_lengths,
)

TRACES = Path(__file__).resolve().parents[2] / "benchmarks" / "traces"
HEADER = "timestamp_ms,input_tokens,output_tokens\n"


@pytest.fixture
def trace(tmp_path):
    """trace(text) -> a file with it."""

    def trace(text: str | bytes) -> Path:
        path = tmp_path / "trace.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return trace


def test_shipped_trace_is_whole():
    requests = read_trace(TRACES / "azure2023_conv.csv")
    assert len(requests) == 19366
    assert requests[:2] == [Request(0.0, 374, 44), Request(4314.579, 396, 109)]
    assert max(request.input_tokens for request in requests) == 14050


def test_csv_columns_may_come_in_any_order_with_others_between(trace):
    path = trace("\ufeffoutput_tokens, extra, input_tokens, timestamp_ms\n7,x,5,1.5\n\n0,y,1,2\n")
    assert read_trace(path) == [Request(1.5, 5, 7), Request(2.0, 1, 0)]


def test_mooncake_json_lines(trace):
    rows = [{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [1, 2]}]
    rows.append({"timestamp": 3000, "input_length": 10, "output_length": 0, "hash_ids": []})
    path = trace("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read_trace(path) == [Request(0.0, 6758, 500), Request(3000.0, 10, 0)]


def test_azures_own_header(trace):
    """Its times are dates with seven digits behind the second; a later publication adds the time zone."""
    path = trace(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.9805900,374,44\n"
        "2023-11-17 00:00:04.2951690,396,109\n2023-11-17 02:00:04.295169+02:00,1,0\n"
    )
    assert read_trace(path) == [Request(0.0, 374, 44), Request(4314.579, 396, 109), Request(4314.579, 1, 0)]
    for value in ("yesterday", "", "4.5", "2023-13-16 18:15:46"):
        bad = trace(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{value},374,44\n")
        with pytest.raises(InputError, match=f"line 2: TIMESTAMP is '{value}'; it must be a date"):
            read_trace(bad)
    with pytest.raises(InputError, match="line 3: TIMESTAMP is 2023-11-16 23:59:58, which is before"):
        read_trace(trace("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59,1,1\n2023-11-16 23:59:58,1,1\n"))
    with pytest.raises(InputError, match="line 1: the column TIMESTAMP says its unit, which is not s"):
        read_trace(path, "s")


def test_burstgpts_own_header(trace):
    path = trace(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n"
    )
    assert read_trace(path) == [Request(5000.0, 472, 18), Request(45000.0, 1087, 0)]


def mooncake(times):
    return "".join(json.dumps({"timestamp": time, "input_length": 5, "output_length": 1}) + "\n" for time in times)


def test_times_in_seconds_under_mooncakes_names(trace):
    """Read as milliseconds they were a thousand times too dense, without a word."""
    path = trace(mooncake(i / 3 for i in range(12)))  # three requests a second
    with pytest.raises(
        InputError,
        match=r"trace.csv: 12 requests within 3.66667 ms, if timestamp is in ms.*--trace-unit s .*--trace-unit ms",
    ):
        read_trace(path)
    assert [r.timestamp_ms for r in read_trace(path, "s")] == pytest.approx([1000 * i / 3 for i in range(12)])
    assert [r.timestamp_ms for r in read_trace(path, "ms")] == pytest.approx([i / 3 for i in range(12)])
    with pytest.raises(InputError, match="'minutes'; it must be one of ms, s"):
        read_trace(path, "minutes")


def test_requests_that_come_together_have_no_unit(trace):
    assert {r.timestamp_ms for r in read_trace(trace(mooncake([7] * 20)))} == {7.0}


def test_the_unit_of_csv_is_in_its_header(trace):
    seconds = trace("timestamp_s,input_tokens,output_tokens\n0,1,1\n0.5,1,1\n")
    assert (
        [r.timestamp_ms for r in read_trace(seconds)]
        == [r.timestamp_ms for r in read_trace(seconds, "s")]
        == [0.0, 500.0]
    )
    with pytest.raises(InputError, match="line 1: the column timestamp_s says its unit, which is not ms"):
        read_trace(seconds, "ms")
    dense = trace(HEADER + "".join(f"{i / 3},1,1\n" for i in range(300)))
    with pytest.raises(
        InputError, match="300 requests within 99.6667 ms, if timestamp_ms is in ms.*a column timestamp_s"
    ):
        read_trace(dense)
    assert len(read_trace(dense, "ms")) == 300


def test_times_out_of_order(trace):
    with pytest.raises(
        InputError,
        match="trace.csv, line 4: timestamp_ms is 4, which is before that of the request before; sort the trace",
    ):
        read_trace(trace(HEADER + "3,1,1\n5,1,1\n4,1,1\n"))
    with pytest.raises(InputError, match="line 2: timestamp is 1, which is before"):
        read_trace(trace(mooncake([3000, 1])))


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("1_0,5,5", "timestamp_ms is '1_0'"),
        ("0,1_0,5", "input_tokens is '1_0'"),
        ("0,10000000000,5", "input_tokens is '10000000000'; no request has more"),
        ("0," + "9" * 5000 + ",5", "input_tokens is '999"),
        ("1e999,5,5", "timestamp_ms is '1e999'"),
        ("-1,5,5", "timestamp_ms is '-1'"),
        ("nan,5,5", "timestamp_ms is 'nan'"),
        ("inf,5,5", "timestamp_ms is 'inf'"),
        ("0,0,5", "input_tokens is '0'"),
        ("0,-3,5", "input_tokens is '-3'"),
        ("0,many,5", "input_tokens is 'many'"),
        ("0,1.5,5", "input_tokens is '1.5'"),
        ("0,nan,5", "input_tokens is 'nan'"),
        ("0,,5", "input_tokens is ''"),
        ("0,5,-1", "output_tokens is '-1'"),
        ("0,5", "no output_tokens"),
    ],
)
def test_bad_csv_rows_are_named_by_file_line_and_value(trace, row, complaint):
    with pytest.raises(InputError) as error:
        read_trace(trace(f"{HEADER}0,1,1\n{row}\n"))
    assert "trace.csv, line 3: " + complaint in str(error.value)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"timestamp": 0, "input_length": NaN, "output_length": 1}', "input_length is nan"),
        ('{"timestamp": 0, "input_length": 1.0, "output_length": 1}', "input_length is 1.0"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', "input_length is True"),
        ('{"timestamp": [], "input_length": 1, "output_length": 1}', "timestamp is []"),
        ('{"timestamp": 0, "output_length": 1}', "no input_length"),
        ('{"timestamp": 0, ', "not JSON"),
        ("[0, 1, 1]", "not an object"),
    ],
)
def test_bad_json_lines_are_named_by_file_line_and_value(trace, row, complaint):
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
    with pytest.raises(InputError) as error:
        read_trace(trace(f"{good}\n{row}\n"))
    assert "trace.csv, line 2: " + complaint in str(error.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        (HEADER, "a header, but no request"),
        ("timestamp_ms,input_tokens,output_tokens,input_tokens\n0,1,1,1\n", "input_tokens twice; one is wanted"),
        (
            "timestamp_ms,timestamp_s,input_tokens,output_tokens\n0,1,1,1\n",
            "has timestamp_ms and timestamp_s; one is wanted",
        ),
        (HEADER + '0,1,"' + "x" * 200_000 + "\n", "line 2: not CSV: field larger than field limit"),
        ('[{"timestamp": 0}]', "line 1: no column timestamp_ms"),
        ('{"a":' * 100_000, "line 1: not JSON"),
        ("timestamp_ms,input_tokens\n0,1\n", "line 1: no column output_tokens"),
        ("0.0,374,44\n", "line 1: no column timestamp_ms, input_tokens, output_tokens"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
    ],
)
def test_bad_files_are_named(trace, text, complaint):
    with pytest.raises(InputError) as error:
        read_trace(trace(text))
    assert "trace.csv" in str(error.value) and complaint in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.csv"):
        read_trace(tmp_path / "nowhere.csv")


REQUESTS = [Request(float(i), 10 * (i + 1), i) for i in range(7)]


def test_scaled_inputs_keep_a_token():
    scaled = scale_lengths(REQUESTS, 0.02)
    assert [request.input_tokens for request in scaled] == [1, 1, 1, 1, 1, 1, 1]
    assert [request.timestamp_ms for request in scaled] == [request.timestamp_ms for request in REQUESTS]
    assert scale_lengths(REQUESTS, 1) == REQUESTS
    for factor in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale"):
            scale_lengths(REQUESTS, factor)


def test_cut_takes_what_there_is():
    assert cut(REQUESTS, 2) == REQUESTS[:2]
    assert cut(REQUESTS, 100, first=5) == REQUESTS[5:]
    for num_requests, first in ((0, 0), (1, 7), (1, -1)):
        with pytest.raises(InputError, match="the trace has 7"):
            cut(REQUESTS, num_requests, first)


def test_round_robin_deals_every_request_once():
    ranks = round_robin(REQUESTS, 3)
    assert ranks == [REQUESTS[0::3], REQUESTS[1::3], REQUESTS[2::3]]
    assert round_robin(REQUESTS[:1], 3) == [REQUESTS[:1], [], []]


def test_rank_tokens():
    assert parse_rank_tokens("4096,16, 0,16", 4) == [4096, 16, 0, 16]
    lengths = [[request.input_tokens for request in rank] for rank in rank_token_requests([4096, 16, 0])]
    assert lengths == [[4096], [16], []]
    for text in ("4096,16", "1,2,3,x", "1,2,3,-4", "", "1,,2,3"):
        with pytest.raises(InputError, match="rank tokens"):
            parse_rank_tokens(text, 4)
