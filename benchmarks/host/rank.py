"""One rank of a build under benchmarks/host: it measures when it is told to, and sleeps in between.

It runs under older builds too, so it keeps to pipemoe's public names. Commands and results are lines of JSON in two
named pipes of the folder given: a rank that waits for its turn takes no time from those that have theirs.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers

import pipemoe


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    before = _resident_bytes()
    world = pipemoe.init("cpu")
    init_bytes = _resident_bytes() - before
    model_config = transformers.AutoConfig.for_model(**settings["model"])
    configs = [pipemoe.Config(mode=mode, **settings["config"]) for mode in settings["modes"]]
    base = pipemoe.load_model(model_config, world, config=configs[0], dtype=torch.float32)
    models = {c.mode: base if c is configs[0] else base.with_config(c) for c in configs}
    facts = {mode: {"workspace_bytes": model.runtime.workspace_bytes} for mode, model in models.items()}
    facts["init_bytes"] = init_bytes
    with open(folder / f"commands.{world.rank}") as commands, open(folder / f"results.{world.rank}", "w") as results:
        print(json.dumps(facts), file=results, flush=True)
        for line in commands:
            command = json.loads(line)
            found = [_step(world, models[command["mode"]], step) for step in command["steps"]]
            print(json.dumps(found), file=results, flush=True)
    world.close()


def _step(world, model, lengths: list[list[int]]) -> list[float]:
    """Times to first token of this rank's sequences. lengths: of every rank's."""
    generator = torch.Generator().manual_seed(world.rank)
    own = [torch.randint(model.decoder.vocab_size, (n,), generator=generator) for n in lengths[world.rank]]
    world.all_gather(b"", "start of a step")
    return model.prefill(own).ttft_seconds


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


main()
