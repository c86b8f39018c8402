"""Lines of the side channel: whole, short, and JSON, whatever goes in and however the bytes come."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.comm.lines import MAX_LINE, LineReader, Outbox, cut, decode_line, encode_line

# Surrogates, characters beyond the BMP and control characters included.
TEXTS = st.one_of(
    st.text(st.characters(), max_size=200),
    st.builds(lambda unit, n: unit * n, st.text(st.characters(), min_size=1, max_size=3), st.integers(1, 100_000)),
)


def in_pieces(reader, data, cuts):
    lines = []
    for begin, end in zip([0, *cuts], [*cuts, len(data)]):
        lines += reader.feed(data[begin:end])
    return lines


@given(TEXTS)
def test_any_text_makes_one_line_that_can_be_read(text):
    line = encode_line({"failure": text, "culprit": 3})
    assert len(line) <= MAX_LINE and line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode_line(line[:-1]) == {"failure": cut(text), "culprit": 3}


@pytest.mark.parametrize("unit", ["x", "\n", "\0", "\u20ac", "\U0001f4a9", "\ud800", '"'])
def test_a_megabyte_of_text_keeps_its_beginning_and_its_end(unit):
    text = "rank 1: why" + unit * 2**20 + "the end"
    found = decode_line(encode_line({"failure": text})[:-1])["failure"]
    assert found.startswith("rank 1: why") and found.endswith("the end") and "characters left out" in found


@given(
    st.lists(
        st.one_of(st.binary(max_size=50), st.integers(MAX_LINE - 2, 2 * MAX_LINE).map(lambda n: b"y" * n)), max_size=6
    ),
    st.data(),
)
def test_lines_come_through_in_any_pieces_and_long_ones_are_dropped(parts, data):
    parts = [part.replace(b"\n", b" ") for part in parts]
    stream = b"".join(part + b"\n" for part in parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    assert in_pieces(LineReader(), stream, cuts) == [part for part in parts if len(part) < MAX_LINE]


@given(st.lists(st.integers(1, 3 * MAX_LINE), min_size=1, max_size=8))
def test_a_peer_that_never_ends_its_line_takes_no_memory(sizes):
    reader = LineReader()
    for size in sizes:
        assert reader.feed(b"z" * size) == []
        assert len(reader._begun) < MAX_LINE
    lines = reader.feed(b"\nnext\n")
    assert lines[-1] == b"next"


@given(
    st.one_of(
        st.binary(max_size=300),
        st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=5).map(lambda v: json.dumps(v).encode()),
    )
)
def test_what_is_no_object_is_no_message(line):
    found = decode_line(line)
    assert found is None or isinstance(found, dict)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"failure": ' + b"9" * 60_000 + b"}",
        b"\xff\xfe",
        b"",
        b"7",
        b"[1, 2]",
        b"null",
        b'"x"',
    ],
)
def test_odd_json_is_no_message(line):
    assert decode_line(line) is None


@pytest.fixture
def pair():
    """A connection whose far end does not read by itself, and takes little."""
    ends = socket.socketpair()
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    ends[0].setblocking(False)
    yield ends
    for end in ends:
        end.close()


def test_a_line_that_was_sent_in_part_is_finished_before_the_next(pair):
    outbox, reader, lines = Outbox(), LineReader(), []
    wanted = [bytes([65 + n]) * (MAX_LINE - 1 - n) for n in range(4)]
    for line in wanted:
        outbox.put(line + b"\n", keep=True)
        outbox.send(pair[0])
    assert outbox  # the last one is not through
    while len(lines) < len(wanted):
        lines += reader.feed(pair[1].recv(5000))
        outbox.send(pair[0])
    assert lines == wanted and not outbox


def test_a_peer_that_does_not_read_is_kept_last_words_but_no_heartbeats(pair):
    outbox = Outbox()
    for _ in range(10_000):
        outbox.put(b"beat" * 1000 + b"\n", keep=False)
        outbox.send(pair[0])
    for n in range(100):
        outbox.put(b"last words %d\n" % n, keep=True)
    assert sum(map(len, outbox._lines)) < MAX_LINE
    reader, lines = LineReader(), []
    while outbox:
        lines += reader.feed(pair[1].recv(5000))
        outbox.send(pair[0])
    pair[0].close()
    while data := pair[1].recv(5000):
        lines += reader.feed(data)
    assert b"last words 0" in lines and {line for line in lines if not line.startswith(b"last")} == {b"beat" * 1000}
