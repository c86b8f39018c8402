"""Every family that transformers ships, loaded from a checkpoint that transformers wrote: the same logits."""

import pytest
import torch

import pipemoe
from pipemoe.models.families import MODULES
from pipemoe.models.whole_decoder import WholeDecoder
from tests.models.tiny_families import FAMILIES, VOCAB, tiny_family_config

pytestmark = pytest.mark.mpi
MODES = ("broadcast", "auto", "padded", "chunked", "two_batch", "per_rank", "pipelined")
LENGTHS = (7, 9, 8, 3)  # rank r has those from r on, so that rank 4 has none


def config(mode):
    return pipemoe.Config(mode=mode, moe_max_num_tokens=16, max_tokens_per_rank=64)


def make_model(family, device="cpu", dtype=torch.float32, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_family_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin with zeros, which would hide what is wrong
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.to(device, dtype)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(world, family, tmp_path_factory):
    model = make_model(family, world.device)
    loaded = pipemoe.load_model(
        saved(world, tmp_path_factory, model), world, config=config("broadcast"), dtype=torch.float32
    )
    assert isinstance(loaded.decoder, WholeDecoder) == (family not in MODULES)
    check(model, loaded, world, ("auto", "broadcast"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_mode(world, family, tmp_path_factory):
    model = make_model(family, world.device)
    loaded = pipemoe.load_model(
        saved(world, tmp_path_factory, model), world, config=config("padded"), dtype=torch.float32
    )
    check(model, loaded, world, MODES)
