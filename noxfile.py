"""Run the tests with the oldest and newest versions that cpc_ext supports: `nox`, or `nox -s "numpy(1.26)"`.

Each session builds the package in an environment of its own; "newest" is what pip finds without constraints.
"""

from __future__ import annotations

import nox

# The index of PyTorch's CPU builds, which pip searches besides its own.
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = "constraints.txt"


@nox.session
@nox.parametrize("version", ["2.11", "newest"], ids=["2.11", "newest"])
def torch(session: nox.Session, version: str) -> None:
    """The oldest PyTorch that dependencies allow, and the newest that installs."""
    run_tests(session, {"torch": None if version == "newest" else f"{version}.*"})


@nox.session
@nox.parametrize("version", ["1.26", "2"], ids=["1.26", "2"])
def numpy(session: nox.Session, version: str) -> None:
    """The oldest NumPy, and the newest of its second generation."""
    run_tests(session, {"numpy": f"{version}.*"})


@nox.session(python=["3.10", "3.14"])
def python(session: nox.Session) -> None:
    """The oldest Python and the newest, with the newest of everything for it."""
    run_tests(session, None)


def run_tests(session: nox.Session, other: dict[str, str | None] | None) -> None:
    """Install the package with the constraints, but ``other`` in place of some, and run the tests.

    Args:
        session: The session in whose environment to run.
        other: Versions by package, with None for the newest. If ``other`` is None, there are no constraints at all.
    """
    arguments = ["--extra-index-url", CPU_BUILDS]
    if other is not None:
        with open(CONSTRAINTS) as file:
            kept = [line for line in file if line.partition("==")[0].strip() not in other]
        chosen = [f"{name}=={version}\n" for name, version in other.items() if version is not None]
        constraints = session.create_tmp() + "/constraints.txt"
        with open(constraints, "w") as file:
            file.writelines(kept + chosen)
        arguments += ["-c", constraints]
    session.install(*arguments, ".[test]", "pytest-xdist", "-C", "cmake.define.CPC_EXT_CUDA=OFF")
    session.run("python", "-m", "cpc_ext", "check")
    session.run("python", "-m", "pytest", "-q", "-n", "auto", "-k", "not emulated", *session.posargs)
