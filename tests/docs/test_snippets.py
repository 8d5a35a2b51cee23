"""Every code block in README and the other pages works unchanged.

A page's Python runs from top to bottom in one namespace, in a folder with the files that the page assumes. Commands are
given to their program's argument parser, which finds options that do not exist or no longer exist; the commands from a
folder of images to features are executed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.distributed.run import parse_args as parse_torchrun

from cpc_ext.data import make_textures
from cpc_ext.programs import entry
from cpc_ext.programs.command_line import Program, parse_command
from cpc_ext.programs.train_options import parse as parse_train
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import MODELS

ROOT = Path(__file__).parents[2]
USERS_PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))
PAGES = (*USERS_PAGES, "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "python/benchmarks/README.md")

# Replacements in a page's Python that make it quick, or let it run without a GPU.
SMALLER = {
    "docs/data.md": [('"cuda"', '"cpu"')],
    "docs/library.md": [
        ("channels=96, layers=12", "channels=12, layers=2"),
        ("(16, 3, 32, 32)", "(2, 3, 8, 8)"),
        ("torch.arange(16)", "torch.arange(2)"),
        ("model.sample(16, 32, labels=labels, progress", "model.sample(2, 8, labels=labels, progress"),
        (
            "model.sample(16, 32, labels=labels, images=images, known_rows=16)",
            "model.sample(2, 8, labels=labels, images=images, known_rows=4)",
        ),
    ],
    "docs/losses.md": [("size=65536", "size=4096")],
}
# The model and the data set of the folder that a page calls RUN, or otherwise.
RUNS = {
    "docs/checkpoints.md": {"RUN": ("cpc-v1", "stl10")},
    "docs/greedy_infomax.md": {"R0": ("greedy-infomax", "textures")},
    "docs/pixel_models.md": {"RUN": ("gated-pixelcnn", "textures")},
    "docs/speech.md": {"RUN": ("cpc-audio", "audio-folder")},
}
# Side in pixels of the images in the folder that a page calls photos, which determines defaults.
PHOTOS = {"docs/results.md": 32}
# Commands that no parser of ours or of a library takes, and why nothing else is done with them.
NOT_TRIED = {
    "python -m venv": "environments are made by whoever runs the tests",
    ". venv/bin/activate": "likewise",
    "pre-commit install": "it would write into the checkout's .git",
    "export": "variables of the shell",
    "python -m build": "tools of a release, which the tests' environment has not",
    "cibuildwheel": "likewise",
    "auditwheel": "likewise",
}


class Block(NamedTuple):
    """A block of code: where its first line is, its language, and its text."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found, begin, language = [], None, ""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if begin is None:
                begin, language = number, line.strip().removeprefix("```")
            else:
                found.append(Block(page, begin + 1, language, dedent("\n".join(lines[begin : number - 1]))))
                begin = None
    assert begin is None, f"{page}:{begin}: this block has no end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> Iterator[tuple[int, str]]:
    """Return the commands of a shell block with their line numbers; continued lines are joined to one command."""
    number = block.line
    for command in re.split(r"(?<!\\)\n", block.text):
        yield number, command.replace("\\\n", " ").strip()
        number += command.count("\n") + 1


def codes_of(page: str) -> Iterator[tuple[int, str]]:
    """Return the texts between backticks in a page's sentences, with their line numbers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, match.start()) + 1, match[1].replace("\n", " ")


COMMANDS = [
    pytest.param(block.page, command, id=f"{block.page}:{line}")
    for block in BLOCKS
    if block.language == "bash"
    for line, command in commands_of(block)
]
IN_SENTENCES = [
    pytest.param(page, code, id=f"{page}:{line}")
    for page in USERS_PAGES
    for line, code in codes_of(page)
    if re.match(r"(python|pip|cpc-ext|torchrun|sphinx-build|sbatch) ", code) and not re.search(r"\bNAME\b|…", code)
]


def test_every_block_is_of_a_kind_that_is_tried():
    """Directives, such as `{toctree}`, are for Sphinx to check; of `text` there is nothing to try."""
    others = [block for block in BLOCKS if not re.fullmatch(r"python|bash|text|\{.*", block.language)]
    assert not others
    assert len(COMMANDS) > 50
    assert len(WITH_PYTHON) > 5


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder that snippets run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["snippet"])
    return tmp_path


def add_photos(folder: Path, side: int = 40) -> None:
    """Twelve small images of each of two classes, eight to learn from."""
    textures = make_textures(24, size=side)
    for number, image in enumerate(textures.images):
        path = folder / ("train" if number < 16 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with photos, and with RUN, the result of docs/training.md's first command on them after a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    add_photos(folder / "photos")
    command = next(command.values[1] for command in COMMANDS if command.values[0] == "docs/training.md")
    short = "--image-size 64 --crop 32 --grid-size 3 --pred-steps 1 --batch-size 4 --steps 2 --warmup-steps 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CPC_EXT_CACHE", str(folder / "cache"))
        assert run(f"{command} {short}") == 0
    return folder


def run(command: str) -> int:
    """Run one of our programs in this process, and return its exit status."""
    interpreter, flag, module, *arguments = shlex.split(command, comments=True)
    assert (interpreter, flag) == ("python", "-m")
    return entry.main([module.removeprefix("cpc_ext."), *arguments])


def test_from_images_to_features(trained, monkeypatch):
    """The pages on training and features, one after the other."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("CPC_EXT_CACHE", str(trained / "cache"))
    for page, command in (parameter.values for parameter in COMMANDS):
        if page == "docs/features.md":
            assert run(command) == 0
    encodings = np.load("encodings.npy")
    names = json.loads(Path("encodings.names.json").read_text())
    assert len(encodings) == len(names) == 24
    assert np.isfinite(encodings).all()
    namespace = run_python("docs/features.md")
    assert namespace["features"].shape == (4, namespace["encoder"].out_channels)


def run_python(page: str) -> dict[str, Any]:
    """Run a page's Python, and return its namespace. Tracebacks name the page's lines."""
    namespace: dict[str, Any] = {"__name__": page}
    smaller, used = SMALLER.get(page, []), set()
    for block in BLOCKS:
        if (block.page, block.language) != (page, "python"):
            continue
        text = block.text
        for old, new in smaller:
            if old in text:
                used.add(old)
                text = text.replace(old, new)
        tree = ast.increment_lineno(ast.parse(text), block.line - 1)
        exec(compile(tree, ROOT / page, "exec"), namespace)
    assert used == {old for old, _ in smaller}, "the page no longer says what SMALLER replaces"
    return namespace


# features.md needs a run: test_from_images_to_features.
WITH_PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"} - {"docs/features.md"})


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python(page, place, request):
    if page == "docs/checkpoints.md":
        shutil.copytree(request.getfixturevalue("trained") / "RUN", place / "RUN")
        shutil.copytree(ROOT / "tests" / "interop" / "checkpoints" / "cpc_audio_lstm_linear", place / "checkpoints")
    namespace = run_python(page)
    for name, expected in EXPECTED.get(page, {}).items():
        assert tuple(namespace[name].shape) == expected, name


# The shapes that comments in the snippets state, for the sizes in SMALLER.
EXPECTED = {
    "README.md": {"patches": (16, 6, 6, 1, 16, 16), "features": (16, 256)},
    "docs/checkpoints.md": {"contexts": (2, 12, 128), "features": (4, 256)},
    "docs/data.md": {"windows": (8, 1, 20480), "speakers": (8,)},
    "docs/library.md": {"drawn": (2, 3, 8, 8)},
    "docs/speech.md": {"encodings": (8, 256, 128), "contexts": (8, 256, 128), "seconds": (128,)},
}


class Parsed(BaseException):
    """Raised when a program has accepted its options."""


@pytest.fixture
def try_program(monkeypatch) -> Callable[[str, list[str]], None]:
    """try_program(path, arguments): a program outside of the package, run until it has parsed its options."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(*arguments: Any) -> None:
        original(*arguments)
        raise Parsed

    def run_until_parsed(path: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.syspath_prepend((ROOT / path).parent)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")

    return run_until_parsed


def parts_of(command: str) -> Iterator[list[str]]:
    """Return the words of each command in a line, without variable assignments and redirections."""
    part: list[str] = []
    for word in [*shlex.split(command, comments=True), "&&"]:
        if word == "&&":
            yield part[: part.index(">")] if ">" in part else part
            part = []
        elif part or not re.fullmatch(r"[A-Z_]+=.*|nice", word):
            part.append(word)


def try_cpc_ext(name: str, arguments: list[str]) -> None:
    """Check a command of the package's programs with its parser, and its check of combinations of options."""
    if name == "train":
        parse_train(arguments)
        return
    main = importlib.import_module(f"cpc_ext.programs.{name}").main
    if not arguments:  # Its name alone, in a sentence.
        assert name in entry.PROGRAMS
    elif isinstance(program := getattr(main, "__self__", None), Program):
        program.check(parse_command(program.command, arguments, prog=name, description=""))
    else:
        main(arguments)


def try_pytest(arguments: list[str], config: pytest.Config) -> None:
    """Check pytest's options, including those of plug-ins, and that the tests exist."""
    given, unknown = config._parser.parse_known_and_unknown_args(arguments, argparse.Namespace())
    assert not unknown
    missing = [path for path in given.file_or_dir if not (ROOT / path).exists()]
    assert not missing


def try_pip(arguments: list[str]) -> None:
    """Check pip's options, and that our extras and files exist."""
    commands = pytest.importorskip("pip._internal.commands", reason="pip is not installed")
    options, requirements = commands.create_command(arguments[0]).parse_args(arguments[1:])
    missing = [path for path in options.constraints if not (ROOT / path).is_file()]
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for requirement in requirements:
        if ours := re.fullmatch(r"(?:\.|cpc_ext)\[(.*)\]", requirement):
            missing += [name for name in ours[1].split(",") if not re.search(rf"^{name} = ", extras, re.MULTILINE)]
    assert not missing


def try_cmake(arguments: list[str]) -> None:
    """Check that variables in a cmake command are CMake's own or those of our files."""
    ours = "".join(path.read_text() for path in (ROOT / "CMakeLists.txt", ROOT / "csrc" / "CMakeLists.txt"))
    settings = [setting[1] for argument in arguments if (setting := re.fullmatch(r"-D(\w+)=.*", argument))]
    missing = [
        name for name in settings if not name.startswith(("CMAKE_", "Python_", "pybind11_")) and name not in ours
    ]
    assert not missing


def try_sphinx(arguments: list[str]) -> None:
    """Check sphinx-build's options, and that the pages exist."""
    parser = pytest.importorskip("sphinx.cmd.build", reason="needs cpc_ext[docs]").get_parser()
    missing = [path for path in [parser.parse_args(arguments).sourcedir] if not (ROOT / path / "conf.py").is_file()]
    assert not missing


@pytest.fixture
def try_words(try_program, request) -> Callable[[list[str]], None]:
    """A function: try_words(words) fails if the program of a command does not accept its words."""

    def tried(words: list[str]) -> None:
        program, *arguments = words
        program = program.removeprefix("mutation/bin/")
        if program == "torchrun":
            given = parse_torchrun(arguments)
            assert given.module
            program, arguments = "python", ["-m", given.training_script, *given.training_script_args]
        first, *others = arguments
        if program == "python" and first == "-m":
            module, *others = others
            if module == "pytest":
                try_pytest(others, request.config)
            elif module == "cpc_ext":
                try_cpc_ext(*(others[0], others[1:]) if others else ("info", []))
            else:
                package, _, name = module.partition(".")
                assert package == "cpc_ext"
                try_cpc_ext(name, others)
        elif program == "python" and first == "-c":
            ast.parse(others[0])
        elif program == "python":
            try_program(first, others)
        elif program == "cpc-ext":
            try_cpc_ext(first, others)
        elif program == "sbatch":
            script = next(word for word in arguments if word.endswith(".slurm"))
            assert (ROOT / script).is_file()
            parse_train(arguments[arguments.index(script) + 2 :])
        elif program in LIBRARIES:
            LIBRARIES[program](arguments)
        else:
            pytest.fail(f"nothing here tries {program}")

    return tried


LIBRARIES = {"pip": try_pip, "cmake": try_cmake, "sphinx-build": try_sphinx}


def add_runs(place: Path, page: str) -> None:
    """Add the folders of runs that the page's commands name, in their state before the first step."""
    for name in ("RUN", "RUN1", "RUN2", "R0"):
        model, dataset = RUNS.get(page, {}).get(name, ("cpc-v1", "textures"))
        (place / name).mkdir()
        (place / name / "config.yaml").write_text(preset(model, dataset).to_yaml())


@pytest.mark.parametrize(("page", "command"), [*COMMANDS, *IN_SENTENCES])
def test_commands(page, command, place, try_words):
    add_runs(place, page)
    if page in PHOTOS:
        add_photos(place / "photos", PHOTOS[page])
    parts = list(parts_of(command))
    tried = [words for words in parts if not any(" ".join(words).startswith(start) for start in NOT_TRIED)]
    for words in tried:
        try:
            try_words(words)
        except SystemExit as done:
            # A program that is asked for its help text ends after it.
            if done.code != 0 or "--help" not in words:
                raise
    if not tried:
        pytest.skip("; ".join(reason for start, reason in NOT_TRIED.items() if start in command))


def test_the_first_run_on_photographs_is_what_was_measured(place):
    """Its figures are of grey patches of 12 pixels, each normalised, as in the run of that day whose config is kept."""
    add_photos(place / "photos", PHOTOS["docs/results.md"])
    of_page = (each.values[1] for each in COMMANDS if each.values[0] == "docs/results.md")
    (command,) = (command for command in of_page if "--steps 1800" in command)
    run = parse_train(shlex.split(command)[3:]).run
    file = ROOT / "python" / "benchmarks" / "results" / "2026-11-24-cpu-label-efficiency.json"
    measured = yaml.safe_load(json.loads(file.read_text())["cpc-v1"]["config"])
    view = type(run.view)(**measured["view"])
    assert run.view.patch == view.patch == 12
    assert run.view.model_copy(update={"patch_size": None}) == view
    assert run.cpc == type(run.cpc)(**measured["cpc"])
    given = {**measured["optimization"], "steps": 1800}
    assert {name: getattr(run.optimization, name) for name in given} == given
    assert run.compute.precision == measured["compute"]["precision"]


def test_all_that_is_not_tried_is_there():
    commands = [" ".join(words) for parameter in COMMANDS for words in parts_of(parameter.values[1])]
    assert all(any(command.startswith(start) for command in commands) for start in NOT_TRIED)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m cpc_ext.train --stepz 3", "--stepz"),
        ("python -m cpc_ext.train --model cpc-v9", "cpc-v9"),
        ("python -m cpc_ext.evaluate RUN --mode none", "none"),
        ("cpc-ext sample RUN --temprature 1", "--temprature"),
        ("cpc-ext trane", "trane"),
        ("torchrun --nprocs-per-node 2 -m cpc_ext.train", "--nprocs-per-node"),
        ("torchrun --nproc-per-node 2 -m cpc_ext.train --gather-negatives rings", "rings"),
        ("python python/benchmarks/kernels.py --operation info_nce", "--operation"),
        ("python python/benchmarks/kernel.py", "kernel.py"),
        ("pip install '.[tests]'", "tests"),
        ("pip install -c constraint.txt .", "constraint.txt"),
        ("pip install --constrained constraints.txt .", "--constrained"),
        ("cmake -S . -B build -DCPC_EXT_NO_SUCH=ON", "CPC_EXT_NO_SUCH"),
        ("python -m pytest -q test/ops", "test/ops"),
        ("python -m pytest --quieter", "--quieter"),
        ("sphinx-build -W doc build/site", "doc"),
        ("sbatch python/examples/train.slurm RUN --stepz 3", "--stepz"),
        ("nvcc --version", "nvcc"),
    ],
)
def test_what_is_wrong_fails(command, message, place, try_words, capsys):
    add_runs(place, "README.md")
    (words,) = parts_of(command)
    with pytest.raises((SystemExit, Exception, pytest.fail.Exception)) as raised:  # Each program's own.
        try_words(words)
    assert message in str(raised.value) + capsys.readouterr().err


def test_options_in_the_text_exist(capsys):
    """What pages call `--option` in a sentence is an option of a program of ours."""
    helps = [["train", "--model", model, "--help"] for model in MODELS]
    helps += [[name, "--help"] for name in entry.PROGRAMS if name != "train"]
    for arguments in helps:
        with pytest.raises(SystemExit):
            entry.main(arguments)
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)) | OF_OTHERS
    for page in USERS_PAGES:
        named = {option for _, code in codes_of(page) for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)}
        assert named <= known, page


# Options of torchrun and sbatch, of viewers of logs, and of programs outside of the package, which pages name.
OF_OTHERS = {
    *("--shutdown-timeout", "--nproc-per-node", "--signals-to-handle", "--signal"),
    *("--logdir", "--backend-store-uri"),
    *("--op", "--models"),
}
