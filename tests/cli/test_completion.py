"""Completion at TAB, as the shells ask for it: by environment variables, in a process that imports no torch."""

import os
import re
import subprocess
import sys

import pytest

from fastbert.workloads import WORKLOADS

SHELLS = ("bash", "zsh")
PROGRAM = (
    "import sys\nfrom fastbert.cli import main\n"
    "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}, 'slow'"
)


def ask(environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def completions(shell, line):
    """What the shell offers at the end of a line."""
    words = line.split(" ")
    if shell == "bash":
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        return ask({"_FASTBERT_COMPLETE": "complete_bash", **asked}).split()
    answer = ask({"_FASTBERT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line})
    return re.findall(r'^"([^"]+)"', answer.partition("((")[2], re.MULTILINE)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fastbert pa", ["parity"]),
        ("fastbert bench --allow", ["--allow-pickle"]),
        ("fastbert bench --workload ", list(WORKLOADS)),
        ("fastbert bench --workload squad-like-8", ["squad-like-8x384"]),
        ("fastbert parity --dtype b", ["bf16"]),
        ("fastbert parity --dtype fp16,", ["fp16,fp32", "fp16,bf16"]),
        ("fastbert parity --device c", ["cpu", "cuda"]),
    ],
)
def test_completion(shell, line, expected):
    assert completions(shell, line) == expected


@pytest.mark.parametrize(("shell", "words"), [("bash", "complete -o default -F"), ("zsh", "#compdef fastbert")])
def test_the_script_for_the_shell(shell, words):
    assert words in ask({"_FASTBERT_COMPLETE": f"source_{shell}"})
