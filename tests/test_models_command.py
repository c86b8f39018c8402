"""`pipemoe models` says what is true, and docs/models.md says the same."""

import json
import re
from pathlib import Path

import pytest

from pipemoe.cli import main
from pipemoe.models.families.list_families import list_families
from pipemoe.models.families.whole import ALIASES
from pipemoe.models_command import table_by_kind
from tests.models.tiny_families import FAMILIES, tiny_family_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def test_the_page_has_its_table():
    shown = re.search(
        r"<!-- families: pipemoe models --by-kind -->\n(.*?)\n<!-- end of families -->", PAGE.read_text(), re.S
    )
    assert shown and shown[1] == table_by_kind(list_families())


def test_every_family_that_is_tried_is_listed_and_no_other():
    listed = {family.model_type for family in list_families()}
    assert listed == {*FAMILIES, *ALIASES}


def test_forms(capsys):
    assert main(["models", "--json"]) == 0
    rows = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["qwen3_moe"]["stated"] and rows["qwen3_moe"]["cuts"] and not rows["olmoe"]["stated"]
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_of_experts_is_true(family):
    from pipemoe.models.whole_loading import find_sites, whole_skeleton

    sites = find_sites(whole_skeleton(tiny_family_config(family)))
    said = next(row for row in list_families() if row.model_type == family)
    for site in sites:
        clamped = "clamped " if site.gating.limit else ""
        assert said.experts.split(",")[0] == clamped + site.gating.activation
        assert ("no gate" in said.experts) == (not site.gated)
        assert ("biases" in said.experts) == (site.gate_up_bias is not None)
        assert ("identity" in said.experts) == bool(site.num_identities)
        assert said.fp8 == (site.gated and site.gate_up_bias is None and site.gating == ("silu", None, 1.0, 0.0))
