"""The skeleton: transformers' model without memory, and torch's RMS norm in the place of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipemoe.models.random_weights import reference_model
from pipemoe.models.skeleton import build_skeleton, fuse_norms
from tests.models.tiny import FAMILIES, VOCAB, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_takes_no_memory(family):
    model = build_skeleton(tiny_config(family), attention="sdpa")
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert not model.training
    assert not model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_norms_compute_the_same(family):
    model = reference_model(tiny_config(family), "cpu", torch.float32)
    tokens = torch.arange(20)[None] % VOCAB
    with torch.no_grad():
        want = model(tokens).logits
        names = list(model.state_dict())
        fuse_norms(model)
        got = model(tokens).logits
    assert list(model.state_dict()) == names
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    assert kinds == {torch.nn.RMSNorm}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_importing_the_models_imports_no_transformers():
    code = (
        "import sys, pipemoe.models, pipemoe.models.loading, pipemoe.models.random_weights\n"
        "assert not {'transformers', 'safetensors', 'cupy', 'mpi4py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
