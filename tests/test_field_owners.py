"""An object's fields are written by its own methods only: of the parts of a rank that all others reach."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pipemoe"
OWNERS = {"world", "conductor", "transport", "runtime", "lanes", "workspace", "channel", "side_channel", "departure"}


def foreign_writes(text: str) -> list[str]:
    """What a module writes into the fields of an owner that it got from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(text)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])):
            while isinstance(target, ast.Subscript):
                target = target.value
            if isinstance(target, ast.Attribute):
                owner = target.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name.lstrip("_") in OWNERS:
                    found.append(ast.unparse(target))
    return found


def test_nobody_writes_into_the_fields_of_another_object():
    found = {str(path.relative_to(PACKAGE)): foreign_writes(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: writes for path, writes in found.items() if writes} == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("self.world.conductor.step += 1", True),
        ("conductor.doing = 'x'", True),
        ("log, world.transport.log = world.transport.log, None", True),
        ("self._world.reserved['a'] = 1", True),
        ("self.conductor = Conductor(0)", False),
        ("conductor.count_op()", False),
    ],
)
def test_a_foreign_write_is_found(text, wrong):
    assert bool(foreign_writes(text)) == wrong
