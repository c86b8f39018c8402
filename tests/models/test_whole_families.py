"""Every family that transformers ships, loaded from a checkpoint that transformers wrote: the same logits."""

import pytest
import torch

import pipemoe
from pipemoe.models.families import MODULES
from pipemoe.models.whole_decoder import WholeDecoder
from tests.models.tiny_families import FAMILIES, VOCAB, is_left_out, make_model

pytestmark = pytest.mark.mpi
MODES = ("broadcast", "auto", "padded", "chunked", "two_batch", "per_rank", "pipelined")
LENGTHS = (7, 9, 8, 3)  # rank r has those from r on, so that rank 4 has none


def config(mode):
    return pipemoe.Config(mode=mode, moe_max_num_tokens=16, max_tokens_per_rank=64)


def saved(world, tmp_path_factory, model, change=lambda folder: None):
    """A checkpoint that all ranks read."""
    folder = None
    if world.rank == 0:
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        change(folder)
    return world.all_gather(str(folder).encode())[0].decode()


def own_sequences(world):
    generator = torch.Generator().manual_seed(world.rank)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS[world.rank :]]


def expected(model, sequences):
    with torch.no_grad():
        return [model(torch.tensor([sequence], device=model.device)).logits[0, -1].float() for sequence in sequences]


def check(model, loaded, world, modes):
    sequences = own_sequences(world)
    wanted = expected(model, sequences)
    for mode in modes:
        found = loaded.with_config(config(mode)).prefill(sequences, keep_logits=True)
        for i, logits in enumerate(wanted):
            assert torch.allclose(found.logits[i], logits, atol=1e-4, rtol=1e-4), mode
            assert found.first_tokens[i] == int(logits.argmax())


def load(world, tmp_path_factory, model, mode="broadcast"):
    folder = saved(world, tmp_path_factory, model)
    return pipemoe.load_model(folder, world, config=config(mode), dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(world, family, tmp_path_factory):
    if is_left_out(world, family):
        pytest.skip("takes a minute; the slow test below runs anywhere")
    model = make_model(family, world.device)
    loaded = load(world, tmp_path_factory, model)
    assert isinstance(loaded.decoder, WholeDecoder) == (family not in MODULES)
    check(model, loaded, world, ("auto", "broadcast"))
    alone = own_sequences(world) if world.rank == 0 else []
    found = loaded.prefill(alone, keep_logits=True)
    assert found.logits is None or torch.allclose(found.logits, torch.stack(expected(model, alone)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_mode(world, family, tmp_path_factory):
    model = make_model(family, world.device)
    check(model, load(world, tmp_path_factory, model, "padded"), world, MODES)
