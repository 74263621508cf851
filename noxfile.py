"""``nox``: the checks that a developer runs by hand; ``nox -l`` lists them.

``nox -s tests`` runs the unit tests over every supported Python and torch, each in an environment of its own, and writes what
came out to ``benchmarks/results/matrix-cpu.json``. One cell of it: ``nox -s "tests-3.13(torch='2.11')"``. The other sessions
but ``build`` run in the environment that nox is started from, which has ``pip install -e ".[test,docs]"``.
"""

from __future__ import annotations

import nox

PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = ("2.9", "2.11", "2.13", "newest")
OLD_NUMPY = "numpy<2.4"  # the interpreter of Triton 3.5 and 3.6 fails with later ones
BESIDE = {"2.9": (OLD_NUMPY, "setuptools"), "2.11": (OLD_NUMPY,)}  # Inductor of torch 2.9 imports setuptools
MATRIX = "benchmarks/results/matrix-cpu.json"

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "docs", "build"]


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """The unit tests; arguments go to pytest. PyPI's torch is a CUDA build of several gigabytes (see CONTRIBUTING.md)."""
    # One call, so that the Triton of the test extra is the one that this torch asks for.
    version = "torch" if torch == "newest" else f"torch=={torch}.*"
    session.install(version, *BESIDE.get(torch, ()), "-e", ".[test]")
    junit = f"{session.create_tmp()}/junit.xml"
    arguments = session.posargs or ["tests/unit"]
    session.run("pytest", *arguments, f"--junitxml={junit}", success_codes=[0, 1])
    session.run("python", "benchmarks/matrix.py", junit, MATRIX, "--", *arguments)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """The API page is up to date, no reference is broken, no word is misspelled; the site goes to ``build/site``."""
    session.run("python", "docs/generate_api.py", "--check")
    session.run("mkdocs", "build", "--strict")
    session.run("codespell")


@nox.session
def build(session: nox.Session) -> None:
    """A wheel and a source distribution in ``dist/``, and their metadata checked."""
    session.install("build", "twine", "hatchling")
    session.run("python", "-m", "build", "--outdir", "dist")
    version = str(session.run("python", "-m", "hatchling", "version", silent=True)).strip()
    session.run(
        "twine", "check", "--strict", f"dist/safealloc-{version}-py3-none-any.whl", f"dist/safealloc-{version}.tar.gz"
    )
