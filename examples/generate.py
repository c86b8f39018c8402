"""A transformers model generates, with its experts spread over the ranks by pipemoe.

    pipemoe run -n 2 examples/generate.py path/to/checkpoint "A short prompt" "Another, on the next rank"

It needs memory for the whole model on each rank while it is loaded; afterwards a rank keeps only its own experts.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import pipemoe


def main(path: str, *prompts: str) -> None:
    world = pipemoe.init()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(world.device)
    experts = pipemoe.from_transformers(model, world, pipemoe.Config(max_tokens_per_rank=4096))
    with experts:  # whoever gets to its end computes its experts for the others, until all are there
        for prompt in prompts[world.rank :: world.size]:
            tokens = tokenizer(prompt, return_tensors="pt").to(world.device)
            text = tokenizer.decode(model.generate(**tokens, max_new_tokens=16, do_sample=False)[0])
            print(f"rank {world.rank}: {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
