"""`pipemoe models`: the families that load, and what serves each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipemoe.models.families.list_families import Listed

_HEAD = ("family", "decoder", "experts", "fused attention", "fp8 experts", "cuts of sequences")


def add_models_parser(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "models",
        help="families of models that load, and what serves each",
        description="Lists the model_types of config.json that load. Decoder: 'stated' in a file of pipemoe's, or "
        "'whole': transformers' own forward, stopped at its experts.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--by-kind", action="store_true", help="families of which the same is true in one row")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from pipemoe.models.families.list_families import list_families

    families = list_families()
    if options.json:
        print(json.dumps([family._asdict() for family in families], indent=1))
    elif options.by_kind:
        print(table_by_kind(families))
    else:
        print(_table([(family.model_type, *_facts(family)) for family in families]))
    return 0


def table_by_kind(families: Sequence[Listed]) -> str:
    """Markdown, one row for families of which the same is true; those with the most to say for themselves first."""
    names: dict[tuple[str, ...], list[str]] = {}
    for family in sorted(families, key=lambda f: (not f.stated, not f.fused_attention, not f.fp8, f.experts)):
        names.setdefault(_facts(family), []).append(family.model_type)
    return _table([(", ".join(sorted(of_kind)), *facts) for facts, of_kind in names.items()], aligned=False)


def _facts(family: Listed) -> tuple[str, ...]:
    answers = (family.fused_attention, family.fp8, family.cuts)
    return "stated" if family.stated else "whole", family.experts, *("yes" if answer else "no" for answer in answers)


def _table(rows: Sequence[tuple[str, ...]], *, aligned: bool = True) -> str:
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    widths = [max(len(line[i]) for line in lines) if aligned else 0 for i in range(len(_HEAD))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
