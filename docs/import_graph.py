"""Draws which part of the code imports which, into docs/code.md, and checks that imports run downwards only.

    python docs/import_graph.py            # rewrite the drawing
    python docs/import_graph.py --check    # exit status 1 if an import runs upwards, or the drawing is not what the
    code says

Imports inside functions count as well; those for type checkers alone do not.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "code.md"
_MARKED = re.compile(r"(<!-- import graph -->\n).*?(<!-- end of import graph -->)", re.DOTALL)

# From the bottom to the top: a part may import parts above it in this list, and its own. A module belongs to the
# longest name that is its own or a package of its.
PARTS: dict[str, tuple[str, ...]] = {
    "errors, arguments, notices": (
        "pipemoe.errors",
        "pipemoe.version",
        "pipemoe.arguments",
        "pipemoe.notices",
        "pipemoe.warn_once",
        "pipemoe.torch_state",
        "pipemoe.kept_code",
        "pipemoe.compiled",
        "pipemoe.addresses",
        "pipemoe.output_path",
    ),
    "pipemoe_kernels": ("pipemoe_kernels",),
    "pipemoe.plan: what a plan is": ("pipemoe.plan",),
    "pipemoe.plan.cost": ("pipemoe.plan.cost",),
    "pipemoe.plan.clock": ("pipemoe.plan.clock",),
    "pipemoe.plan.auto": ("pipemoe.plan.auto",),
    "pipemoe.plan.planner": ("pipemoe.plan.planner",),
    "pipemoe.model_facts": ("pipemoe.model_facts",),
    "config, trace, wire": ("pipemoe.config", "pipemoe.trace", "pipemoe.wire", "pipemoe.e4m3", "pipemoe.mxfp4"),
    "pipemoe.experts": ("pipemoe.experts",),
    "pipemoe.comm": ("pipemoe.comm",),
    "pipemoe.rolling": ("pipemoe.rolling",),
    "pipemoe.models": ("pipemoe.models",),
    "pipemoe.runtime": ("pipemoe.runtime",),
    "pipemoe.world": ("pipemoe.world",),
    "layer, model, plug_in": ("pipemoe.layer", "pipemoe.model", "pipemoe.plug_in"),
    "pipemoe.serving": ("pipemoe.serving",),
    "pipemoe": ("pipemoe",),
    "pipemoe.traffic": ("pipemoe.traffic",),
    "commands": (
        "pipemoe.__main__",
        "pipemoe.cli",
        "pipemoe.launch",
        "pipemoe.plan_command",
        "pipemoe.models_command",
        "pipemoe.plan_report",
        "pipemoe.plan_traffic",
        "pipemoe.report",
        "pipemoe.tune",
        "pipemoe.doctor",
        "pipemoe.contention",
    ),
}
_RANK = {part: rank for rank, part in enumerate(PARTS)}


def modules() -> dict[str, Path]:
    """Every module of the two packages, by name."""
    found = {}
    for root, top in ((CHECKOUT, "pipemoe"), (CHECKOUT / "kernels", "pipemoe_kernels")):
        for path in sorted((root / top).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    names = {name: part for part, names in PARTS.items() for name in names}
    return names[max((n for n in names if module == n or module.startswith(f"{n}.")), key=len)]


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports."""
    found: set[str] = set()
    for module, names in _import_statements(path):
        found |= (names & known.keys()) or {module}
    return found & known.keys()


@cache
def _import_statements(path: Path) -> list[tuple[str, set[str]]]:
    """Of each import: the module, and what may be modules in it."""
    found: list[tuple[str, set[str]]] = []
    for statement in _run_time_statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            found += [(alias.name, set()) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            found.append((statement.module, {f"{statement.module}.{alias.name}" for alias in statement.names}))
    return found


def _run_time_statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_time_statements(child)


def upward_imports() -> list[str]:
    """Imports that run upwards, or within a part in a circle, in words."""
    known = modules()
    imports = {name: imports_of(path, known) - {name} for name, path in known.items()}
    wrong = [
        f"{name} ({part_of(name)}) imports {other} ({part_of(other)})"
        for name, others in imports.items()
        for other in sorted(others)
        if _RANK[part_of(other)] > _RANK[part_of(name)]
    ]
    while ends := [name for name, others in imports.items() if not others]:
        imports = {name: others - set(ends) for name, others in imports.items() if name not in ends}
    return wrong + [f"{name} is part of a circle of imports" for name in sorted(imports)]


def drawing() -> str:
    """A Mermaid graph of the parts, without arrows that a longer way already shows."""
    known = modules()
    below: dict[str, set[str]] = {part: set() for part in PARTS}
    for name, path in known.items():
        below[part_of(name)] |= {part_of(other) for other in imports_of(path, known)}
    reached: dict[str, set[str]] = {}
    lines = ["```mermaid", "graph TD"]
    for part in PARTS:  # from the bottom: what lies below a part is known before the part
        direct = below[part] - {part}
        reached[part] = direct.union(*(reached[other] for other in direct))
    for part in reversed(PARTS):
        direct = below[part] - {part}
        shown = direct - set().union(*(reached[other] for other in direct))
        lines.append(f'    {_RANK[part]}["{part}"]')
        lines += [f"    {_RANK[part]} --> {_RANK[other]}" for other in sorted(shown, key=lambda p: -_RANK[p])]
    return "\n".join([*lines, "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw which part of the code imports which, into docs/code.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; say what is wrong")
    check = parser.parse_args().check
    if wrong := upward_imports():
        print("\n".join(wrong), file=sys.stderr)
        return 1
    page = PAGE.read_text()
    drawn = _MARKED.sub(lambda match: match[1] + drawing() + match[2], page)
    if check and drawn != page:
        print("docs/code.md: the drawing is not what the code says: run docs/import_graph.py", file=sys.stderr)
    elif not check:
        PAGE.write_text(drawn)
    return int(check and drawn != page)


if __name__ == "__main__":
    sys.exit(main())
