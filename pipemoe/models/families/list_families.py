"""The list of families that load: those stated here, and those found in transformers' own files by the form of their
experts, without importing these.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipemoe.models.families import MODULES, find_family
from pipemoe.models.families.family import Family
from pipemoe.models.families.whole import ALIASES, is_whole
from pipemoe.models.other_forms import OTHER_FORMS

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")
_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


class Listed(NamedTuple):
    """One family. `stated`: a file here says what its layers are made of; else transformers' own forward runs."""

    model_type: str
    stated: bool
    experts: str  # their activation, and what else is special about them
    fused_attention: bool  # on a GPU
    fp8: bool  # does experts="hopper_fp8" serve its experts?
    cuts: bool  # may a sequence be cut over several cohorts?


@cache
def list_families() -> tuple[Listed, ...]:
    """All of them, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = []
    for model_type in {*MODULES, *ALIASES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}:
        own = ALIASES.get(model_type, model_type)
        if own in MODULES:
            fused = type(find_family(own)).attention is not Family.attention
            found.append(Listed(model_type, True, "silu", fused, True, True))
        elif is_whole(own) and (experts := _experts_of(own)):
            found.append(Listed(model_type, False, experts, False, _is_plain(experts), False))
    return tuple(sorted(found))


def _is_plain(experts: str) -> bool:
    return experts.startswith("silu") and not any(word in experts for word in ("no gate", "biases"))


def _experts_of(model_type: str) -> str | None:
    """What transformers' module of a family says of its experts; None if it has none of a known form."""
    from transformers import CONFIG_MAPPING

    file = _modeling_file(model_type)
    text = file.read_text() if file else ""
    if "Experts" not in text and not any(name in text for name in OTHER_FORMS):
        return None
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        marks = {mark for mark in map(_keywords_of_mark, node.decorator_list) if mark is not None}
        if not marks and node.name not in OTHER_FORMS:
            continue
        keywords = next(iter(marks), frozenset())
        clamped = any(isinstance(item, ast.FunctionDef) and item.name == "_apply_gate" for item in node.body)
        config = CONFIG_MAPPING[model_type]()
        name = next((getattr(config, field) for field in _ACTIVATION_FIELDS if getattr(config, field, None)), "silu")
        words = [f"clamped {_NAMES.get(name, name)}" if clamped else _NAMES.get(name, name)]
        words += ["no gate"] if ("has_gate", False) in keywords else []
        words += ["biases"] if ("has_bias", True) in keywords else []
        words += ["identity experts"] if node.name == "LongcatFlashExperts" else []
        words += ["scaled input"] if node.name == "Llama4TextMoe" else []
        return ", ".join(words)
    return None


def _keywords_of_mark(decorator: ast.expr) -> frozenset[tuple[str, bool]] | None:
    """The arguments of use_experts_implementation, if it is that."""
    call = decorator if isinstance(decorator, ast.Call) else None
    named = call.func if call else decorator
    if not isinstance(named, ast.Name) or named.id != "use_experts_implementation":
        return None
    keywords = call.keywords if call else []
    return frozenset((k.arg or "", bool(k.value.value)) for k in keywords if isinstance(k.value, ast.Constant))


def _modeling_file(model_type: str) -> Path | None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    name = model_type_to_module_name(model_type)
    spec = importlib.util.find_spec("transformers")
    for root in spec.submodule_search_locations or () if spec else ():
        file = Path(root) / "models" / name / f"modeling_{name}.py"
        if file.is_file():
            return file
    return None
