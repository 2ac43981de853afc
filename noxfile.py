"""`make test-compat`: one wheel beside old and new Pythons, torches and transformers, judged by the drop-in tests.

`make test-abi` (`nox -- ARGUMENTS OF PYTEST`) runs others in the same rows: every op by its CUDA kernels, emulated by
one library of csrc/ops_cuda.cpp that was built beside another torch than the rows'.

A row is an environment in .cache/nox, kept for the next time. Tests run from a copy, so that fastbert is the wheel's.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CACHE = ROOT / ".cache"
WHEELS = CACHE / "wheel"
BUILT = WHEELS / "built.txt"  # why its library has no CUDA kernels (repr); where the emulated ones are
ROOMS = ["tests/models", "tests/huggingface"]  # tests/ops: test-abi
TOOLS = ("hypothesis==", "parameterized==", "pytest==")
# transformers 5.11 builds XLMRobertaForMultipleChoice and CamembertForMultipleChoice without the pooler that they read
BROKEN_IN_5_11 = "XLMRobertaForMultipleChoice or CamembertForMultipleChoice or AutoModelForMultipleChoice"
# and tests that take all heads of a family, or of all families
BROKEN_IN_5_11 += " or test_eligible_forwards_are_fast or test_as_stock and (xlm-roberta or camembert)"
ROWS = [
    nox.param("3.10", "torch==2.11.0", "transformers==5.11.0", f"not ({BROKEN_IN_5_11})", id="oldest"),
    nox.param("3.12", "torch==2.11.0", "transformers==5.17.0", "", id="between"),
    nox.param("3.13", "torch", "transformers", "", id="newest"),
]
CHECK = """
import fastbert, platform, torch, transformers
from fastbert.native import load
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
print(fastbert.__file__, "library:", load().reason or "loads", "with CUDA:", load().cuda_reason or "yes")
built = load().available and load().cuda_reason == CUDA_REASON
raise SystemExit(0 if built else "the library does not load here as it was built")
"""

nox.options.envdir = str(CACHE / "nox")
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True  # a row that cannot run has failed
nox.options.download_python = "never"
nox.options.sessions = ["compat"]

if "PYENV_ROOT" in os.environ:  # pyenv hides the Pythons that are installed and not active
    installed = sorted(path.name for path in Path(os.environ["PYENV_ROOT"], "versions").iterdir())
    os.environ.setdefault("PYENV_VERSION", ":".join(installed))


@nox.session(python=False)
def wheel(session: nox.Session) -> None:
    """Builds the wheel, with the Python, the torch and the tools that nox runs with."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # a build leaves files behind that the next would take in
        for name in ("fastbert", "csrc", "kernels"):
            shutil.copytree(ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("__pycache__", "_native.*"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        session.run(*pip, "-w", str(WHEELS), folder, external=True)
    ask = "from fastbert import native; from tests import emulated; print(repr(native.load().cuda_reason)); "
    ask += "print(emulated.built() if emulated.is_here() else '')"
    BUILT.write_text(str(session.run(sys.executable, "-c", ask, silent=True, external=True)))


@nox.session(requires=["wheel"])
@nox.parametrize("python, torch, transformers, chosen", ROWS)
def compat(session: nox.Session, torch: str, transformers: str, chosen: str) -> None:
    """Installs the wheel beside one torch and one transformers, and runs the drop-in tests."""
    (built,) = WHEELS.glob("*.whl")
    pins = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    tools = [pin for pin in pins if pin.startswith(TOOLS)]
    session.install("-q", "--upgrade", torch, transformers, *tools, str(built))
    session.install("-q", "--force-reinstall", "--no-deps", str(built))
    session.install("-q", "--no-deps", "--require-hashes", "-r", "requirements/demo.txt")  # a real model for the tests
    folder = copy_of_tests(session)
    session.chdir(folder)
    cuda_reason, emulated = BUILT.read_text().splitlines()[:2]
    session.run("python", "-c", CHECK.replace("CUDA_REASON", cuda_reason))
    session.run("fastbert", "doctor", silent=True)
    tests = session.posargs or ["-k", chosen, *ROOMS]
    pytest = ["python", "-m", "pytest", "-q", "-p", "tests.rooms", "-m", "not slow"]
    session.run(*pytest, *tests, env={"FASTBERT_EMULATED": emulated})


def copy_of_tests(session: nox.Session) -> Path:
    """A folder with the tests and what they read, and with those of the transformers that is installed."""
    folder = Path(session.create_tmp()) / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    theirs = folder / ".cache/transformers-tests"
    theirs.mkdir(parents=True)
    (folder / ".cache/antiberty").symlink_to(CACHE / "antiberty")
    ask = ["python", "-c", "from importlib.metadata import version; print(version('transformers'))"]
    version = str(session.run(*ask, silent=True)).strip()
    pip = ["python", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(theirs)]
    session.run(*pip, f"transformers=={version}")
    shutil.unpack_archive(theirs / f"transformers-{version}.tar.gz", theirs, filter="data")
    return folder
