"""Goes over a transformers model's modules and finds its routed experts; refuses by name what has no known form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipemoe.errors import InputError
from pipemoe.models.experts_form import ExpertsSite, config_of, is_usual, usual_site
from pipemoe.models.other_forms import OTHER_FORMS


def find_experts(model: torch.nn.Module) -> list[ExpertsSite]:
    """The model's sites, in the order of its modules. Raises InputError if there are none, if one is of no known form,
    or if they differ in what must be the same in all layers.
    """
    sites: list[ExpertsSite] = []
    looked_at = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in OTHER_FORMS:
            sites.append(OTHER_FORMS[kind](name, module, config_of(model, module)))
        elif is_usual(module):
            sites.append(usual_site(name, module, config_of(model, module)))
        elif "expert" in kind.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            looked_at.append(f"{name} ({kind}: {_held(module)})")
    inner = {site.name for site in sites}
    looked_at = [text for text in looked_at if not any(text.startswith(f"{name}.") for name in inner)]
    if not sites:
        seen = "; ".join(looked_at[:3]) or "no module with matrices for each expert"
        raise InputError(
            f"no routed experts were found in a {type(model).__name__}: looked for gate_up_proj [E, 2I, H] (or "
            f"up_proj) and down_proj [E, H, I] in a module that use_experts_implementation marks; there is {seen}"
        )
    first = sites[0]
    for site in sites[1:]:
        for what in ("num_experts", "top_k", "hidden"):
            if getattr(site, what) != getattr(first, what):
                raise InputError(
                    f"{site.name} has {what} {getattr(site, what)}, but {first.name} has {getattr(first, what)}; "
                    "layers whose experts differ in that are not done"
                )
    return sites


def _held(module: torch.nn.Module) -> str:
    held: Sequence[str] = [f"{name} {list(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    return ", ".join(held[:4]) or "no parameters"
