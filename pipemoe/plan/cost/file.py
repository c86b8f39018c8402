"""The JSON file of a measured cost model: what `pipemoe tune` writes, and `Config.cost` names.

    {"schema": "pipemoe.cost/7", "subject": {"device": ..., "num_ranks": ..., "model": ..., ...}, "cost": {...}}

The subject says what was measured. A file is used for exactly that and refused for anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipemoe.errors import ConfigError
from pipemoe.output_path import write_whole
from pipemoe.plan.cost.model import CostModel, cost_from_dict

SCHEMA = "pipemoe.cost/7"


def write_cost(path: str | os.PathLike[str], subject: Mapping[str, Any], cost: CostModel) -> None:
    """Readers see the old file or the whole new one. Raises InputError if it cannot be written."""
    document = {"schema": SCHEMA, "subject": dict(subject), "cost": asdict(cost)}
    write_whole(path, json.dumps(document, indent=1) + "\n")


def read_cost_bytes(path: str | os.PathLike[str]) -> bytes:
    """What a file holds. Raises ConfigError if there is no such file, or it cannot be read."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # such as a NUL in it
        raise ConfigError(f"{path!r} is no path: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; pipemoe tune writes such a file") from None


def cost_of_bytes(raw: bytes, path: str | os.PathLike[str], subject: Mapping[str, Any] | None = None) -> CostModel:
    """The cost model in `raw`, read from `path`. Raises ConfigError, naming the first difference, if it is of another
    `subject` (None: any will do) or another version."""
    found, cost = subject_and_cost(raw, path)
    for key in sorted({*found, *(subject or found)}):
        wanted = found.get(key) if subject is None else subject.get(key)
        if found.get(key) != wanted:
            raise ConfigError(
                f"{path}: measured with {key} {found.get(key)!r}, but here it is {wanted!r}; run pipemoe tune again"
            )
    return cost


def subject_and_cost(raw: bytes, path: str | os.PathLike[str]) -> tuple[dict[str, Any], CostModel]:
    """What was measured, and the cost model, in `raw`, read from `path`. Raises ConfigError if that is of another
    version, or no cost file.
    """
    try:
        document = json.loads(raw)
        schema, found = document["schema"], dict(document["subject"])
        if schema != SCHEMA:
            raise ConfigError(f"{path}: schema is {schema!r}, not {SCHEMA!r}; run pipemoe tune again")
        document["cost"]["experts"].pop("sliced_permille", None)  # files have it from before blocks of columns went
        return found, cost_from_dict(document["cost"])
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from None
    except json.JSONDecodeError:
        raise ConfigError(f"{path} is no cost file: it is no JSON; pipemoe tune writes such a file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no cost file: {type(error).__name__}: {error}") from None
