"""Every code block of README.md and docs/ works. Python runs, on any number of ranks. Commands are such as their
programs take, and those that are quick run.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest

from tests.code_blocks import NOT_RUN, PAGES, ROOT, code_blocks

_PYTHON = [page for page in PAGES if code_blocks(page, "python")]
_SHELL = [page for page in PAGES if code_blocks(page, "bash")]
_PLACEHOLDERS = ("script.py", "first.py")  # the reader's own
_LAUNCHED_DIRECTLY = (
    "launch/quickstart.sh",
    "launch/install.sh",
    "launch/test.sh",
    "launch/test_gpu.sh",
    "launch/sanitize.sh",
)


def test_pages_have_blocks_and_each_says_its_language():
    assert len(_PYTHON) >= 4 and len(_SHELL) >= 6
    odd = [b for page in PAGES for b in code_blocks(page) if b.language not in ("python", "bash", *NOT_RUN)]
    assert not odd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks run, with a small checkpoint at the place that the pages name."""
    import torch

    from pipemoe.models.random_weights import reference_model
    from tests.models.tiny import tiny_config

    folder = tmp_path_factory.mktemp("blocks")
    reference_model(tiny_config("qwen3_moe"), "cpu", torch.float32, seed=3).save_pretrained(
        folder / "path" / "to" / "checkpoint"
    )
    return folder


@pytest.mark.mpi
@pytest.mark.parametrize("page", _PYTHON)
def test_python(page, world, folder, monkeypatch):
    """A page's blocks run one after the other, as a reader would paste them."""
    import transformers

    import pipemoe

    monkeypatch.chdir(folder)
    monkeypatch.setattr(pipemoe, "init", lambda: world)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: _Tokenizer())
    names = {"__name__": "__main__"}
    for block in code_blocks(page, "python"):
        code = compile("\n" * block.line + block.code, page, "exec")  # errors name the page's line
        if block.needs is None or _is_there(block.needs):
            exec(code, names)


def _is_there(needs: str) -> bool:
    """Of a package. What else a block may need, the test stands in for."""
    return not needs.isidentifier() or needs == "tokenizer" or find_spec(needs) is not None


class _Tokenizer:
    def __call__(self, prompt: str, return_tensors: str):
        import torch
        from transformers import BatchEncoding

        ids = torch.tensor([[ord(letter) % 50 for letter in prompt]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.mark.parametrize("page", _SHELL)
def test_commands(page, tmp_path, monkeypatch, capsys):
    from pipemoe import cli, launch, plan_command
    from pipemoe.report import command as report
    from pipemoe.tune import command as tune

    for module, name in ((cli, "_doctor"), (report, "run"), (tune, "run"), (launch, "run")):
        monkeypatch.setattr(module, name, lambda options: 0)
    printed, run_plan = "", plan_command.run
    for block in code_blocks(page, "bash", "text"):
        if block.language == "text":
            missing = [line for line in block.code.splitlines() if _shape(line) not in printed]
            assert not (printed and missing), f"{page}:{block.line}: no such line is printed: {missing}"
            printed = ""
            continue
        capsys.readouterr()
        monkeypatch.setattr(plan_command, "run", (lambda options: 0) if block.needs else run_plan)
        parsed = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
        assert not parsed.returncode, f"{page}:{block.line}: {parsed.stderr}"
        for line in block.code.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            while words and "=" in words[0] and not words[0].startswith("-"):
                words.pop(0)  # variables
            if words:
                monkeypatch.chdir(tmp_path)
                _check(words, f"{page}:{block.line}: {line}")
        printed = _shape(capsys.readouterr().out)


def _shape(text: str) -> str:
    """Without figures, which change with every measured cost, and without the space before them."""
    return re.sub(r" +", " ", re.sub(r"[\d.]+", "#", text)).replace("<- chosen", "").rstrip()


def _check(words: list[str], where: str) -> None:
    """Fails unless the command exists and takes these arguments. `pipemoe plan` and `models` run, where
    the block needs nothing that a test lacks.
    """
    program, arguments = words[0], words[1:]
    if program in ("pipemoe", ".venv/bin/pipemoe"):
        _check_pipemoe(arguments, where)
    elif program in ("launch/mpirun.sh", "launch/one_gpu.sh", "launch/gpu_ranks.sh"):
        assert os.access(ROOT / program, os.X_OK), where
        while arguments and (arguments[0] in ("-n", "--hostfile") or arguments[0].isdigit()):
            arguments = arguments[1 if arguments[0].isdigit() else 2 :]
        _check_program(arguments, where)
    elif program in _LAUNCHED_DIRECTLY or program.startswith("benchmarks/"):
        assert os.access(ROOT / program, os.X_OK), where
    elif program in ("python", ".venv/bin/python"):
        _check_program(arguments, where)
    elif program in ("sbatch", "srun"):
        named = [word for word in arguments if word.startswith("launch/")]
        assert named and all((ROOT / word).exists() for word in named), where
    else:
        assert program in ("pip", "git", "cd", "mkdocs"), where


def _check_pipemoe(arguments: list[str], where: str) -> None:
    from pipemoe import cli, launch

    if arguments[0] == "run":
        assert launch.run(arguments[1:]) == 0, where  # replaced
        _check_program(arguments[arguments.index("-n") + 2 :], where)
        return
    try:
        assert cli.main(arguments) == 0, where
    except SystemExit as error:
        pytest.fail(f"{where}: {error}")


def _check_program(arguments: list[str], where: str) -> None:
    """Of a script or module, and its arguments."""
    if arguments[0] == "-m":
        module = arguments[1]
        if module == "pipemoe.cli":
            _check_pipemoe(arguments[2:], where)
        else:
            assert module in ("pytest", "mkdocs", "package.module", "ruff", "mypy"), where
        return
    assert arguments[0] in _PLACEHOLDERS or (ROOT / arguments[0]).exists(), where
    if arguments[0] in ("benchmarks/ttft", "benchmarks/serve"):
        options = importlib.import_module(f"{arguments[0].replace('/', '.')}.options")
        try:
            options.parse(arguments[1:])
        except SystemExit as error:
            pytest.fail(f"{where}: {error}")
