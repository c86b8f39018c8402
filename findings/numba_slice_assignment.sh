#!/usr/bin/env bash
# numba: a function that assigns an array to a slice compiles for seconds; the same copy as a loop, for a tenth of one.
#
#   findings/numba_slice_assignment.sh      (needs Python 3.11 and pip, no GPU; a minute, most of pip)
#
# Expected: `to[:n] = rows[:n]` compiles like the two loops that copy element by element, a check of shapes added.
# Seen: should the shapes differ, the error's message names them. It is put together at run time, so that numba compiles
# its strings into the function: conversion of integers, joining, concatenation, all Unicode widths. That adds seconds,
# to each process that finds nothing in the cache. With error_model="numpy", nogil or boundscheck off it is the same. A
# scalar (`to[:n] = 0`) is not affected.
#
# Seen on 2026-12-02 with numba 0.68.1, numpy 2.4.6, Python 3.11 on one idle core:
#   loop: 0.1 s, 11 kB of assembly, 0 functions of strings
#   assignment: 3.6 s, 135 kB of assembly, 21 functions of strings
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -qq --disable-pip-version-check numba==0.68.1 numpy==2.4.6
"$python" -m pip list --disable-pip-version-check | grep -E "^(numba|numpy) "

cat >"$work/compare.py" <<'PYTHON'
import time

from numba import float32, int64, njit, void
from numba.core import event


class StringFunctions(event.Listener):
    """Functions of numba's strings that are compiled, by name."""

    def __init__(self):
        self.names = []

    def on_start(self, found):
        if found.kind == "numba:compile" and found.data["dispatcher"].py_func.__module__ == "numba.cpython.unicode":
            self.names.append(found.data["dispatcher"].py_func.__qualname__)

    def on_end(self, found):
        pass


def loop(to, rows, n):
    for i in range(n):
        for h in range(to.shape[1]):
            to[i, h] = rows[i, h]


def assignment(to, rows, n):
    to[:n] = rows[:n]


signature = void(float32[:, ::1], float32[:, ::1], int64)
njit(signature)(lambda to, rows, n: None)  # numba's own start
seen = {}
for function in (loop, assignment):
    listener = StringFunctions()
    with event.install_listener("numba:compile", listener):
        begin = time.perf_counter()
        compiled = njit(signature, error_model="numpy")(function)
        seconds = time.perf_counter() - begin
    size = len(compiled.inspect_asm(compiled.signatures[0]))
    seen[function.__name__] = seconds, size, len(listener.names)
    print(f"{function.__name__}: {seconds:.1f} s, {size / 1000:.0f} kB of assembly, {len(listener.names)} functions of strings")
assert seen["loop"][2] == 0, "the loop needs strings: this finding is out of date"
assert seen["assignment"][2] > 5, "the assignment needs no strings: this finding is out of date"
assert seen["assignment"][0] > 3 * seen["loop"][0], "the assignment compiles quickly: this finding is out of date"
assert seen["assignment"][1] > 5 * seen["loop"][1], "the assignment is short: this finding is out of date"
PYTHON
"$python" "$work/compare.py"
