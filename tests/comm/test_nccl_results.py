"""Results of NCCL that cupy has no name for, by a library that gives them."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe.comm import nccl
from pipemoe.comm.nccl import NcclTransport
from pipemoe.comm.transport import WaveSums
from pipemoe.errors import FatalError
from pipemoe.plan.schedule import Segment, Wave

WIDTH, TOKENS = 8, (3, 0, 2)


class Communicator:
    """Keeps (name of the call, its arguments). Calls named in `results` give that result of NCCL."""

    results = {}

    def __init__(self, size, unique_id, rank):
        self.calls = []
        result(self.results.get("init", 0))

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            result(self.results.get(name, 0))

        return call


class NcclError(RuntimeError):
    pass


def result(number):
    """As cupy does: a table of names that ends at 5 or 6."""
    if number > 6:
        raise KeyError(number)
    if number:
        raise NcclError(f"NCCL_ERROR: {number}")


@pytest.fixture
def transports(monkeypatch):
    """One per rank."""
    names = ("UINT8", "FLOAT32", "FLOAT64", "FLOAT16", "BFLOAT16", "SUM")
    monkeypatch.setattr(Communicator, "results", {})
    library = SimpleNamespace(
        NcclCommunicator=Communicator,
        NcclError=NcclError,
        groupStart=lambda: result(Communicator.results.get("groupStart", 0)),
        groupEnd=lambda: result(Communicator.results.get("groupEnd", 0)),
        get_unique_id=lambda: result(Communicator.results.get("get_unique_id", 0)),
        get_version=lambda: result(Communicator.results.get("get_version", 0)),
        **{f"NCCL_{name}": name for name in names},
    )
    monkeypatch.setattr(nccl, "library", lambda: library)
    monkeypatch.setattr(nccl, "_current_stream", lambda: "stream")
    return [NcclTransport(rank, len(TOKENS), [b"dispatch", b"combine"]) for rank in range(len(TOKENS))]


def sums_of(wave, dtype=torch.float32):
    results = [torch.zeros(s.num_rows, WIDTH, dtype=dtype) for s in wave.segments if s.rank == 0]
    return WaveSums(
        torch.zeros(wave.num_rows, WIDTH, dtype=dtype), results, torch.zeros(2, wave.num_rows, WIDTH, dtype=dtype)
    )


WAVE = Wave((Segment(0, 0, 3, 0), Segment(1, 0, 3, 3), Segment(2, 0, 3, 6)), 9)
ROWS = torch.zeros(9, WIDTH, dtype=torch.uint8)
CALLS = {
    "check_async_error": lambda t: t.check(),
    "abort": lambda t: t.abort(),
    "init": lambda t: NcclTransport(0, 3, [b"dispatch", b"combine"]),
    "get_unique_id": lambda t: nccl.unique_ids(2),
    "get_version": lambda t: nccl.version(),
    "allGather": lambda t: t.dispatch(0, 0, WAVE, "padded", ROWS),
    "bcast": lambda t: t.dispatch(0, 0, WAVE, "broadcast", ROWS),
    "groupStart": lambda t: t.dispatch(0, 0, WAVE, "broadcast", ROWS),
    "groupEnd": lambda t: t.combine(0, 0, WAVE, "broadcast", "gather", sums_of(WAVE)),
    "send": lambda t: t.combine(0, 0, WAVE, "broadcast", "gather", sums_of(WAVE)),
    "recv": lambda t: t.combine(0, 0, WAVE, "broadcast", "gather", sums_of(WAVE)),
    "reduce": lambda t: t.combine(0, 0, WAVE, "broadcast", "reduce", sums_of(WAVE)),
    "reduceScatter": lambda t: t.combine(0, 0, WAVE, "padded", "reduce", sums_of(WAVE)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("number", "words"), [(7, "in progress"), (8, "timed out"), (99, "unknown result")])
def test_results_that_cupy_has_no_name_for_are_named(transports, name, number, words):
    Communicator.results[name] = number
    if (name, number) == ("check_async_error", 7):
        transports[0].check()  # no error
        return
    with pytest.raises(nccl.NcclFailed, match=rf"^NCCL: {words} \(result {number}\) in ") as caught:
        CALLS[name](transports[0])
    assert isinstance(caught.value, FatalError)
    assert ("NCCL_COMM_BLOCKING" in str(caught.value)) == (number == 7)


def test_all_communicators_are_looked_at_though_one_is_in_progress(transports):
    Communicator.results["check_async_error"] = 7
    transports[0].check()
    assert all(("check_async_error",) in comm.calls for comm in transports[0]._comms)
    transports[0]._comms[1].results = {"check_async_error": 8}
    with pytest.raises(nccl.NcclFailed, match="timed out"):
        transports[0].check()


def test_other_errors_stay_what_they_are(transports):
    Communicator.results["check_async_error"] = 2
    with pytest.raises(NcclError):
        transports[0].check()
    with pytest.raises(KeyError, match="torch.int64"):
        transports[0].combine(0, 0, WAVE, "broadcast", "reduce", sums_of(WAVE, torch.int64))
