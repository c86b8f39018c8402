#!/usr/bin/env bash
# A cast to float8_e8m0fnu rounds a scale to nearest: the largest value of its block is then up to a third too small.
#
#   findings/fp8_scales_in_e8m0.sh      (needs Python 3.11 and pip, no GPU; some minutes, all of pip)
#
#   PIPEMOE_TORCH_INDEX  a package index to take torch from; one with its CPU build spares the CUDA libraries
#
# Expected: scale = peak / 448, scale.to(float8_e8m0fnu) and (x / scale).to(float8_e4m3fn) quantise a block for MXFP8,
# as the same lines without the first cast do with a float32 scale; what cannot be a scale becomes NaN.
# Seen: an e8m0 value is a power of two, and more than half of the scales are rounded down. x / scale then passes 448,
# and torch's cast to e4m3 saturates (infinity, too, becomes 448): the largest value of those blocks is cut, with
# nothing infinite or NaN to see. A scale has to be rounded up. ml_dtypes rounds alike, but there the cast to e4m3
# gives NaN. And a negative scale loses its sign in torch, without a word; ml_dtypes makes it NaN, and a scale of 0
# (an all-zero block) too.
#
# Seen on 2026-12-01 with torch 2.13.0, ml_dtypes 0.6.0, numpy 2.4.6, on 1200 blocks with peaks from 56 to 3584:
#   torch: 58 % of the scales are rounded down; peaks lose up to 33 %, 0 % are NaN; unfit: 5.877e-39, 2, 448
#   ml_dtypes: 58 % of the scales are rounded down; peaks lose up to 4 %, 53 % are NaN; unfit: nan, nan, nan
# 4 % is e4m3's own rounding. Unfit are 0 and -2 as scales in e8m0 and infinity in e4m3.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
pip() {
    "$python" -m pip --disable-pip-version-check "$@"
}
pip install -qq ${PIPEMOE_TORCH_INDEX:+--index-url "$PIPEMOE_TORCH_INDEX"} torch==2.13.0
pip install -qq ml_dtypes==0.6.0 numpy==2.4.6
pip list | grep -E "^(torch|ml_dtypes|numpy) "

"$python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

peaks = (448 * 2.0 ** np.linspace(-3, 3, 1200, endpoint=False)).astype(np.float32)
scales = peaks / np.float32(448)


def in_torch(x, dtype):
    return torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()


def in_ml_dtypes(x, dtype):
    return x.astype(getattr(ml_dtypes, dtype)).astype(np.float32)


seen = []
for name, cast in (("torch", in_torch), ("ml_dtypes", in_ml_dtypes)):
    rounded = cast(scales, "float8_e8m0fnu")
    kept = cast(peaks / rounded, "float8_e4m3fn") * rounded / peaks
    percents = np.mean(rounded < scales), 1 - np.nanmin(kept), np.mean(np.isnan(kept))
    down, lost, nan = (round(100 * float(part)) for part in percents)
    no_scales = cast(np.array([0, -2], np.float32), "float8_e8m0fnu")
    infinity = cast(np.array([np.inf], np.float32), "float8_e4m3fn")
    unfit = ", ".join(f"{value:.4g}" for value in (*no_scales, *infinity))
    seen.append((down, lost, nan, unfit))
    print(f"{name}: {down} % of the scales are rounded down; ", end="")
    print(f"peaks lose up to {lost} %, {nan} % are NaN; unfit: {unfit}")
if seen != [(58, 33, 0, "5.877e-39, 2, 448"), (58, 4, 53, "nan, nan, nan")]:
    raise SystemExit("float8 casts give other values now: this finding is out of date")
PYTHON
