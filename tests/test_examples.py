"""The scripts in examples/ run, on any number of ranks, and what they print is right."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

import pipemoe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPTS = ("the first prompt", "a second", "and one more that is longer", "last")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, arguments...) -> the lines that it prints; in `world`, for a script of ranks."""

    def run(script: str, *arguments: str, world=None) -> list[str]:
        if world is not None:
            monkeypatch.setattr(pipemoe, "init", lambda: world)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with a tokenizer of letters, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pipemoe.models.random_weights import reference_model
    from tests.models.tiny import tiny_config

    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config("qwen3_moe")
    reference_model(config, "cpu", torch.float32, seed=3).save_pretrained(folder)
    letters = {chr(97 + i) if i < 26 else f"<{i}>": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<26>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<26>").save_pretrained(folder)
    return folder


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


@pytest.mark.mpi
def test_own_attention(world, run):
    (line,) = run("own_attention.py", world=world)
    tokens = [304, 7, 0, 7][world.rank % 4]
    assert line == f"rank {world.rank}: {tokens} tokens through 2 layers, as in the naive loop"


@pytest.mark.mpi
def test_first_tokens(world, run, checkpoint):
    lines = run("first_tokens.py", str(checkpoint), *PROMPTS, world=world)
    wanted = [expected(checkpoint, prompt, 1) for prompt in PROMPTS[world.rank :: world.size]]
    assert len(lines) == len(wanted)
    for line, tokens in zip(lines, wanted):
        assert f"-> {tokens.split()[-1]!r} after " in line


@pytest.mark.mpi
def test_generate(world, run, checkpoint):
    lines = run("generate.py", str(checkpoint), *PROMPTS, world=world)
    assert lines == [
        f"rank {world.rank}: {expected(checkpoint, prompt, 16)!r}" for prompt in PROMPTS[world.rank :: world.size]
    ]


@pytest.mark.mpi
def test_service(world, run, checkpoint):
    """Every rank is asked over HTTP, and stops by a signal once its own answers are there."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    found: dict[str, tuple[int, dict]] = {}

    def ask(path: str, data: bytes | None = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("localhost", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET" if data is None else "POST", path, data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def client() -> None:
        try:
            while "first" not in found:  # it listens soon
                with contextlib.suppress(ConnectionRefusedError):
                    found["first"] = ask("/first_token", b'{"tokens": [3, 1, 4]}')
            found["bad id"] = ask("/first_token", b'{"tokens": [-1]}')
            found["no json"] = ask("/first_token", b"hello")
            found["nowhere"] = ask("/")
            found["statistics"] = ask("/statistics")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    thread = threading.Thread(target=client)
    thread.start()
    try:
        lines = run("service.py", str(checkpoint), str(port - world.rank), world=world)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
    thread.join()
    assert lines == [f"rank {world.rank}: http://localhost:{port}"]
    assert found["first"][0] == 200 and found["first"][1]["ms"] > 0
    model = pipemoe.load_model(str(checkpoint), world)
    assert model.prefill([[3, 1, 4]]).first_tokens == [found["first"][1]["token"]]
    assert [found[name][0] for name in ("bad id", "no json", "nowhere", "statistics")] == [400, 400, 404, 200]
    assert found["statistics"][1]["answered"] == 1


def expected(checkpoint: Path, prompt: str, count: int) -> str:
    """The prompt and what transformers' own model says next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    tokens = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**tokens, max_new_tokens=count, do_sample=False)[0])


def test_cluster_plan(run):
    lines = run("cluster_plan.py", "100")
    assert [line.split()[0] for line in lines[1:4]] == ["4", "8", "16"]
    for line in lines[1:4]:
        lockstep, auto = (float(part.split()[1]) for part in line.partition(": ")[2].split("), "))
        assert auto < lockstep  # the short prompts pass the long one
    assert lines[4] == "broadcast: more than 16 GPUs are needed" and lines[5].startswith("auto: ")
