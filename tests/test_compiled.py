"""Functions that are compiled at their first call: not before, with or without a folder to keep them in, and told
of.
"""

import ast
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pipemoe
from pipemoe import compiled, notices
from pipemoe.compiled import Compiled

PACKAGE = Path(pipemoe.__file__).parent


@pytest.fixture
def told(monkeypatch):
    """What is logged, in order, as in a process that has told nothing yet; `arrived` is set by the first."""
    texts, arrived = [], threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())
            arrived.set()

    for name in notices._PLACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(texts_of := logging.getLogger("pipemoe"), "propagate", False)
    handler = Handler()
    texts_of.addHandler(handler)
    yield texts, arrived
    texts_of.removeHandler(handler)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, env=os.environ | environment
    )


def test_importing_and_planning_for_one_cohort_compile_nothing():
    """Not even numba is imported; nor by `pipemoe --help`, nor where a mode never has several cohorts."""
    done = run_python(
        """
import pipemoe, pipemoe.cli, pipemoe.model, pipemoe.plan.auto.choice, pipemoe.plan.clock.prediction
from pipemoe.plan.planner import compile_planner, plan
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.plan.config import PlanConfig
shape = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=3)
for mode, num_ranks in (("padded", 2), ("broadcast", 2), ("chunked", 2), ("per_rank", 1), ("pipelined", 1)):
    config = PlanConfig(mode=mode, moe_max_num_tokens=16)
    compile_planner(num_ranks, shape, config, CostModel())
    assert len(plan(Facts(((30, 7),) * num_ranks), shape, config).cohorts) == 1
assert not {"numba", "torch"} & set(sys.modules)
import logging
assert not logging.getLogger().handlers and not logging.getLogger("pipemoe").handlers
"""
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_a_folder_to_keep_code_in(tmp_path):
    """Home, the cache and the package cannot be written: everything works, and that is told once. (Files in place of
    folders: whoever runs the tests may be allowed to write anywhere.)"""
    shutil.copytree(PACKAGE, tmp_path / "pipemoe", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("", "plan", "experts", "models"):
        (tmp_path / "pipemoe" / folder / "__pycache__").write_text("in the way")
    (file := tmp_path / "file").write_text("no folder")
    done = run_python(
        f"""
sys.path.insert(0, {str(tmp_path)!r})
import pipemoe
assert pipemoe.__file__.startswith({str(tmp_path)!r})
import numpy as np
from pipemoe.experts import pairs
from pipemoe.plan.clock.clock import run_clock
offsets, positions = np.zeros(3, np.int64), np.zeros((1, 2), np.int32)
ids = np.array([[1, 0]], np.int32)
pieces = np.array([[0, ids.ctypes.data, 0, 1, 0]], np.int64)
pairs.index_pairs(pieces, 8, 0, offsets, positions, np.zeros(2, np.int64), np.zeros((1, 2), np.int64))
pairs.combine_rows.compile()
assert offsets.tolist() == [0, 1, 2] and positions.tolist() == [[1, 0]] and not pairs.index_pairs.is_kept
from pipemoe import cli
cli.main(["doctor"])
""",
        HOME=str(file),
        XDG_CACHE_HOME=str(file),
        NUMBA_CACHE_DIR=str(file),
        PYTHONDONTWRITEBYTECODE="1",
        MPI_LOCALRANKID="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled code cannot be kept on disk, so") == done.stderr.count("NUMBA_CACHE_DIR") == 1
    assert all(line.startswith("pipemoe: ") for line in done.stderr.splitlines()), done.stderr
    assert "WARN  compiled code" in done.stdout and "NUMBA_CACHE_DIR" in done.stdout


def test_long_compiling_is_told_before_and_after(told, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE_SECONDS", 0.0)
    texts, arrived = told

    def one_more(n):
        return n + 1

    def signatures():
        assert arrived.wait(60)  # compiling takes as long as nobody has been told
        from numba import types

        return [types.int64(types.int64)]

    function = Compiled(one_more, signatures=signatures, what="a test", seconds=7)
    assert function(1) == 2 and function(2) == 3
    assert len(texts) == 2
    assert texts[0].startswith("pipemoe: compiling a test, which takes about 7 s") and texts[1].startswith(
        "pipemoe: compiled a test in "
    )


def test_quick_compiling_is_not_told(told, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE_SECONDS", 600.0)
    assert Compiled(lambda n: n + 1, what="a test")(1) == 2
    assert not told[0]


def test_a_part_is_called_by_compiled_code_and_by_python(told):
    part = Compiled(lambda n: n * 3, inside=True)

    def whole(n):
        return part(n) + 1

    function = Compiled(whole)
    assert function(2) == 7 and part("ab") == "ababab"


def test_only_the_given_signatures_are_compiled_from_many_threads(told):
    from numba import types

    def half(n):
        return n // 2

    function = Compiled(half, signatures=lambda: [types.int64(types.int64)])
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(function(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(function.dispatcher.signatures) == 1
    with pytest.raises(TypeError):
        function("no number")


def test_no_compiled_function_assigns_an_array_to_a_slice():
    """Each such line takes three seconds to compile (findings/numba_slice_assignment.sh)."""
    found, num_compiled = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            decorators = {n.id for d in function.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
            if not decorators & {"compiled", "compiled_part", "compiled_look", "compiled_rule", "part"}:
                continue
            num_compiled += 1
            for line in ast.walk(function):
                if isinstance(line, ast.Assign) and _has_slice(line.targets) and _has_slice([line.value]):
                    found.append(f"{file}:{line.lineno}")
    assert not found and num_compiled > 50


def _has_slice(expressions) -> bool:
    return any(isinstance(node, ast.Slice) for e in expressions for node in ast.walk(e))
