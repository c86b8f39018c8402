"""Timing of device work: graph replays with a cold L2 cache, and the ceilings of this device in this run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
GEMM_SIZE = 8192
COPY_BYTES = 4 << 30
REPEATS = 20  # of short work in one graph, and of calls in a row on the host


def captured(work: Callable[[], None], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after two runs outside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    return graph


def interleaved_ms(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each graph in each round. At its start the L2 cache holds nothing useful, and nothing to write
    back.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    total = torch.zeros((), device="cuda")
    events = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.sum(flush, dim=0, out=total)
            start.record()
            graph.replay()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def repeated_us(work: Callable[[], None], rounds: int = 5) -> float:
    """Microseconds of short device work, repeated in one graph so that launching the graph does not count."""
    graph = captured(work, REPEATS)
    return 1e3 * statistics.median(interleaved_ms({"work": graph}, rounds)["work"]) / REPEATS


def host_us(call: Callable[[], None], rounds: int = 5) -> float:
    """Microseconds of the host for a call that only enqueues, median; too few in a row to wait for the device."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(REPEATS):
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(found)


def roofline(rounds: int = 100) -> dict[str, float]:
    """This device's dense bfloat16 rate once it is warm (the second half of a second and more), and its copy bandwidth,
    read plus written, the best of two ways."""
    a, b = (torch.randn((GEMM_SIZE, GEMM_SIZE), device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(COPY_BYTES // 16, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)

    def multiply() -> None:
        for _ in range(8):
            torch.mm(a, b, out=product)

    copies = {"copied": lambda: target.copy_(source), "inverted": lambda: torch.bitwise_not(source, out=target)}
    copy_ms = interleaved_ms({name: captured(copy) for name, copy in copies.items()}, 10)
    gemm_ms = interleaved_ms({"gemm": captured(multiply)}, rounds)["gemm"][rounds // 2 :]
    return {
        "tflops": 8 * 2 * GEMM_SIZE**3 / statistics.median(gemm_ms) / 1e9,
        "copy_tbps": 2 * source.nbytes / min(map(statistics.median, copy_ms.values())) / 1e9,
    }
