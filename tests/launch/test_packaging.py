"""setup.cfg against the tree."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    return parser


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for root, top in ((CHECKOUT, "pipemoe"), (CHECKOUT / "kernels", "pipemoe_kernels"))
        for path in (root / top).rglob("__init__.py")
    }
    assert set(setup_cfg()["options"]["packages"].split()) == found


def test_packages_ship_their_types_the_launchers_and_the_reports_page():
    shipped = dict(setup_cfg()["options.package_data"])
    types = {"pipemoe": "py.typed", "pipemoe_kernels": "py.typed"}
    assert shipped == types | {"pipemoe.launch": "*.sh", "pipemoe.report": "page.html"}
    assert (CHECKOUT / "pipemoe" / "py.typed").exists()
    assert (CHECKOUT / "kernels" / "pipemoe_kernels" / "py.typed").exists()


def test_kernels_folder_is_no_package():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_pins_satisfy_what_setup_cfg_asks_for():
    """Every pin is of something that is asked for, and the numpy pin is below numba-cuda's limit."""
    options = setup_cfg()
    asked = options["options"]["install_requires"] + "".join(options["options.extras_require"].values())
    names = set(re.findall(r"^[A-Za-z][\w-]*", asked, re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (CHECKOUT / "constraints.txt").read_text(), re.MULTILINE))
    assert set(pins) <= names
    assert tuple(map(int, pins["numpy"].split(".")[:2])) < (2, 5)
    assert pins["torch"] == "2.13.0"
    assert {"ruff", "mypy"} <= set(pins)  # another version has other rules
