#!/usr/bin/env bash
# A torch.cuda.MemPool that ends waits for the kernels of all streams, and lets no other Python thread run meanwhile.
#
#   findings/mempool_end_stops_python.sh      (needs Python, pip and an NVIDIA GPU; pip takes some minutes)
#
#   PIPEMOE_TORCH_PYTHON  a Python that has torch 2.11.0 for CUDA, instead of one that is installed for this
#
# Expected: a MemPool's memory goes back when nothing uses it any more. That may take the driver some time, but other
# threads go on, as they do in torch.cuda.empty_cache, which waits for all streams as well.
# Seen: they stand still for as long as any stream has work, related to the pool or not. A pool also ends when Python
# collects garbage, so the moment is nobody's choice. If the other stream waits for something that another thread
# does later, neither ends; so here it is a plain sleep of about half a second.
#
# Seen on 2026-12-03 with torch 2.11.0 (cu130) on an H200, Python 3.12:
#   torch.cuda.empty_cache: 0.51 s, the other thread stood still for 0.00 s
#   a pool's last name goes: 0.51 s, the other thread stood still for 0.51 s
#   a pool is collected as garbage: 0.51 s, the other thread stood still for 0.51 s
set -euo pipefail
unset PYTHONPATH
command -v nvidia-smi >/dev/null || { echo "needs a GPU" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PIPEMOE_TORCH_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    python=$work/venv/bin/python
    "$python" -m pip --disable-pip-version-check install -qq torch==2.11.0
fi

"$python" - <<'PYTHON'
import gc
import threading
import time
import warnings

import torch

warnings.simplefilter("ignore")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
stream = torch.cuda.Stream()
gaps, done = [], threading.Event()


def look_around():
    """Another thread, which needs the interpreter every millisecond; notes how long it had to wait for it."""
    last = time.perf_counter()
    while not done.wait(0.001):
        now = time.perf_counter()
        gaps.append((now, now - last))
        last = now


def shown(what, act, cycles=1_000_000_000):
    """How long `act` takes while another stream sleeps, and the other thread's longest wait in that time."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)
    begun = time.perf_counter()
    act()
    took = time.perf_counter() - begun
    stream.synchronize()
    time.sleep(0.05)
    stood = max(gap for at, gap in gaps if at >= begun)
    print(f"{what}: {took:.2f} s, the other thread stood still for {stood:.2f} s")
    return took, stood


def used_pool():
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    return pool


kept = [used_pool(), used_pool()]
cycle = [kept[1]]
cycle.append(cycle)
kept[1] = None
gc.collect()  # cycle is still named: nothing ends here
spare = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
del spare
other = threading.Thread(target=look_around)
other.start()
try:
    emptied = shown("torch.cuda.empty_cache", torch.cuda.empty_cache)
    dropped = shown("a pool's last name goes", lambda: kept.pop(0))
    del cycle
    collected = shown("a pool is collected as garbage", gc.collect)
finally:
    done.set()
    other.join()
if emptied[0] < 0.2 or emptied[1] > 0.1 or any(took < 0.2 or stood < 0.2 for took, stood in (dropped, collected)):
    raise SystemExit("pools end otherwise now: this finding is out of date")
PYTHON
