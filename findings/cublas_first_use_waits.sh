#!/usr/bin/env bash
# With CUDA_MODULE_LOADING=EAGER a product of another number of rows still waits, the first time, for all streams.
#
#   findings/cublas_first_use_waits.sh      (needs Python, pip and a Hopper GPU; some minutes, all of pip)
#
#   PIPEMOE_TORCH_PYTHON  a Python that has torch 2.11.0 for CUDA, instead of one that is installed for this
#
# Expected: CUDA's guide says that EAGER loads all kernels when a program starts, and advises it where kernels of
# different streams must run side by side. So a matrix product on one stream never waits for a kernel of another.
# Seen: it makes no difference. cuBLAS chooses its kernel by the number of rows, and loads it when it is first used. That
# call does not return until the kernel of the other stream is over, although that fills one thread block only. Once
# more, the same product does not wait. Nor does one of 63 rows after one of 64, which takes the same kernel. If the
# other kernel waits for something that only comes after the product, as a collective may, neither ends; so here it is
# a plain sleep of .3 s.
#
# Seen on 2026-12-02 with torch 2.11.0 (cu130) on an H200, both with EAGER and with LAZY:
#   first products of 63 to 1500 rows that wait: 128 200 256 300 400 500 700 1024 1100 1500; of the second ones: none
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

for loading in EAGER LAZY; do
    CUDA_MODULE_LOADING=$loading "$python" - <<'PYTHON'
import os
import warnings

import torch

warnings.simplefilter("ignore")
mode, where = os.environ["CUDA_MODULE_LOADING"], torch.cuda.get_device_name()
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {where}, CUDA_MODULE_LOADING={mode}")
x = torch.randn(1500, 2048, device="cuda", dtype=torch.bfloat16)
weight = torch.randn(5120, 2048, device="cuda", dtype=torch.bfloat16)
out = torch.empty(1500, 5120, device="cuda", dtype=torch.bfloat16)
streams = torch.cuda.Stream(), torch.cuda.Stream()


def waits(rows, cycles=500_000_000):
    """Does a product on one stream wait for a sleeping kernel on another?"""
    slept, multiplied = torch.cuda.Event(), torch.cuda.Event()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(cycles)
        slept.record()
    with torch.cuda.stream(streams[1]):
        torch.mm(x[:rows], weight.t(), out=out[:rows])
        multiplied.record()
    multiplied.synchronize()
    found = slept.query()
    torch.cuda.synchronize()
    return found


torch.cuda.synchronize()
waits(64, cycles=1)  # all that any first product needs
sizes = [63, 128, 200, 256, 300, 400, 500, 700, 1024, 1100, 1500]
found = [[rows for rows in sizes if waits(rows)] for _ in range(2)]
first, second = (" ".join(map(str, waited)) or "none" for waited in found)
print(f"first products of 63 to 1500 rows that wait: {first}; of the second ones: {second}")
if found[1] or 63 in found[0] or not set(found[0]) > {128, 1500}:
    raise SystemExit("products wait at other times now: this finding is out of date")
PYTHON
done
