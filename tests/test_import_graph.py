"""Imports run downwards only, and the drawing of them in docs/code.md is that of the code."""

import ast
import importlib.util
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("import_graph", CHECKOUT / "docs" / "import_graph.py")
import_graph = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(import_graph)


def test_imports_run_downwards_only():
    assert import_graph.upward_imports() == []


def test_the_drawing_is_that_of_the_code():
    assert import_graph.drawing() in import_graph.PAGE.read_text()


def test_comm_and_trace_name_nothing_of_the_runtime_not_even_as_a_type():
    files = [*(CHECKOUT / "pipemoe" / "comm").glob("*.py"), CHECKOUT / "pipemoe" / "trace.py"]
    for path in files:
        imported = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in imported if name.startswith(("pipemoe.runtime", "pipemoe.world"))], path


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("pipemoe.plan.schedule", "from pipemoe.plan.cost import model", True),
        ("pipemoe.comm.mpi", "def f():\n    import pipemoe.runtime.run", True),
        ("pipemoe.comm.mpi", "if TYPE_CHECKING:\n    import pipemoe.runtime.run", False),
        ("pipemoe.plan.planner", "from pipemoe.plan.auto.choice import auto_assignment", False),
        ("pipemoe.plan.config", "from pipemoe.plan.schedule import Wave", True),  # a circle: schedule imports config
    ],
)
def test_an_upward_import_or_a_circle_is_found(module, text, wrong, tmp_path, monkeypatch):
    known = import_graph.modules()
    changed = tmp_path / "changed.py"
    changed.write_text(known[module].read_text() + "\n" + text + "\n")
    monkeypatch.setattr(import_graph, "modules", lambda: known | {module: changed})
    assert bool(import_graph.upward_imports()) == wrong
