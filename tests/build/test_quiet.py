"""What the package says, writes and reaches while it works: nothing that was not asked for."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.build.conftest import ROOT

SOURCES = sorted([*(ROOT / "fastbert").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a source: (the last part of what is called, the call)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def problems(source: str) -> list[str]:
    """What a module of the package does that it should not."""
    found = []
    for name, call in calls(source):
        said = ast.unparse(call)
        given = [ast.unparse(argument) for argument in call.args]
        trust = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        if said.startswith(("print(", "pprint", "sys.stdout.write(", "sys.stderr.write(")):
            found.append(f"prints: {said}")
        if name == "getLogger" and given[:1] not in (["'fastbert'"], ["__name__"]):
            found.append(f"takes a logger that is not its own: {said}")
        if name in ("addHandler", "basicConfig", "setLevel", "captureWarnings", "simplefilter", "filterwarnings"):
            found.append(f"changes how the program logs or warns: {said}")
        if said.startswith("logging.") and name in ("debug", "info", "warning", "error", "exception", "critical"):
            found.append(f"speaks through the root logger: {said}")
        if trust not in ([], ["False"]):
            found.append(f"trusts code out of a checkpoint: {said}")
        if name == "from_pretrained" and trust != ["False"]:
            found.append(f"lets HuggingFace ask whether to run code out of a checkpoint: {said}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_prints_own_logger_no_trust(path: Path) -> None:
    found = problems(path.read_text())
    if path.name == "cli.py":  # whose JSON goes to stdout as it is
        found = [problem for problem in found if not problem.startswith("prints: sys.stdout.write(")]
    assert found == []


PLANTED = {
    "prints": "print('loaded')",
    "takes a logger": "import logging\nlogging.getLogger().warning('x')",
    "changes how": "import logging\nlogging.getLogger('fastbert').addHandler(logging.StreamHandler())",
    "speaks through": "import logging\nlogging.warning('x')",
    "trusts": "AutoModel.from_pretrained(folder, trust_remote_code=True)",
    "lets HuggingFace ask": "AutoTokenizer.from_pretrained(folder)",
}


@pytest.mark.parametrize("words", PLANTED)
def test_what_is_planted_is_found(words: str) -> None:
    assert any(found.startswith(words) for found in problems(PLANTED[words]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The root of empty folders: home, the working folder, and one for temporary files."""
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path


def python(home: Path, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python in those folders with an environment that says nothing about HuggingFace; `answer` is its stdin."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    folders = {"HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "PYTHONPATH": str(ROOT)}
    environment = {**kept, **folders, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=home / "cwd", env=environment, input=answer, capture_output=True, text=True)


def written(home: Path) -> list[str]:
    """The files in those folders, caches left out."""
    files = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[:2] != ("home", ".cache"))


def test_import_loads_neither_torch_nor_transformers(home: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'typer'}"
    run = python(home, "-W", "error", "-c", f"import sys, fastbert; sys.exit(str({heavy} & set(sys.modules) or ''))")
    assert (run.stdout, run.stderr.strip(), written(home)) == ("", "", [])


USE = """
import logging, os, sys, warnings
import fastbert
fastbert.BertModel
import torch, transformers

def state():
    loggers = [logging.getLogger(), logging.getLogger("fastbert"), logging.getLogger("transformers")]
    return [(x.level, x.handlers[:], x.propagate, x.disabled) for x in loggers], dict(os.environ), warnings.filters[:]

before = state()
model = transformers.BertModel.from_pretrained(sys.argv[1])
fastbert.accelerate(model)
mask = (torch.arange(9) < torch.tensor([[9], [2], [5]])).long()
for train in (True, False):
    out = model.train(train)(input_ids=mask * 7, attention_mask=mask)
    out.last_hidden_state.sum().backward()
with torch.no_grad():
    model(input_ids=mask * 7, attention_mask=mask)
text = str(fastbert.explain(model))
assert "3 forwards so far: fast" in text, text
fastbert.pool(out.last_hidden_state, mask, "mean")
fastbert.restore(model)
assert fastbert.AutoModel.from_pretrained(sys.argv[1])._fastbert
fastbert.accelerate(model)  # it stays fast until Python ends
with torch.no_grad():
    model(input_ids=mask * 7, attention_mask=mask)
assert state() == before, (before, state())
"""


def test_use_is_silent(home: Path, checkpoint: Path) -> None:
    """No word on stdout or stderr, no warning, no handler, level or variable changed, no file left."""
    quiet = "from transformers.utils import logging as hf; hf.disable_progress_bar()\n"  # HuggingFace's own bar
    run = python(home, "-W", "error", "-c", quiet + USE, str(checkpoint))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert written(home) == []


AUDITED = """
import json, sys
watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
           "urllib.Request", "http.client.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
events = []

def hook(event, arguments):
    if event in watched:
        events.append([event, str(arguments[:2])])
        if event != "subprocess.Popen":
            raise PermissionError(f"{event}{arguments}")

sys.addaudithook(hook)
"""
COMMANDS = """
from fastbert import cli
for arguments in (["doctor"], ["parity", sys.argv[1], "--dtype", "fp32"]):
    code = None
    try:
        cli.app(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 0, (arguments, code)
"""
TELL = "\nopen('events.json', 'w').write(json.dumps(events))\n"


def events_of(home: Path, code: str, *arguments: str) -> list[list[str]]:
    run = python(home, "-c", AUDITED + code + TELL, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((home / "cwd/events.json").read_text())


def test_nothing_reaches_out(home: Path, checkpoint: Path) -> None:
    """No connection and no process but git's, which tells doctor and parity the commit of a checkout."""
    events = events_of(home, USE + COMMANDS, str(checkpoint))
    assert [event for event in events if not event[1].startswith("('git', ['git', '--no-optional-locks', '-C', ")] == []


def test_the_audit_sees_a_connection_and_a_process(home: Path) -> None:
    plant = """
import os, socket, subprocess, urllib.request
def shell(): os.system("true")
def connect(): socket.create_connection(("localhost", 9))
def fetch(): urllib.request.urlopen("http://localhost:9")
for reach in (shell, connect, fetch):
    try:
        reach()
    except PermissionError:
        pass
subprocess.run(["true"])
"""
    seen = {event for event, _ in events_of(home, plant)}
    assert seen == {"socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.system"}


HOSTILE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig): pass
class Model(BertModel): config_class = Config
class Tokenizer(BertTokenizer): pass
"""


@pytest.fixture(params=["bert", "unknown-kind"])
def hostile(request: pytest.FixtureRequest, checkpoint: Path, home: Path) -> Path:
    """A checkpoint with a module that writes a file when it is imported, named in config and tokenizer config."""
    folder = home / "hostile"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    auto = dict.fromkeys(("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"), "own.Model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": request.param, "auto_map": {"AutoConfig": "own.Config", **auto}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(HOSTILE.format(marker=str(home / "marker")))
    return folder


LOAD = """
import sys, torch, fastbert
for name in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"):
    try:
        getattr(fastbert, name).from_pretrained(sys.argv[1])
    except Exception as error:
        print(name, error)
"""


def test_auto_classes_run_no_code_of_a_checkpoint(home: Path, hostile: Path) -> None:
    run = python(home, "-c", LOAD, str(hostile))
    assert run.returncode == 0, run.stderr
    assert not (home / "marker").exists()


@pytest.mark.parametrize("command", ["parity", "bench"])
def test_commands_run_no_code_of_a_checkpoint_and_do_not_ask(home: Path, hostile: Path, command: str) -> None:
    run = python(home, "-c", "from fastbert import cli; cli.app()", command, str(hostile), answer="y\n" * 9)
    assert run.returncode == 2
    assert "fastbert never runs code out of a checkpoint" in " ".join(run.stderr.split())
    assert not (home / "marker").exists()


def test_the_hostile_checkpoint_is_hostile(home: Path, hostile: Path) -> None:
    load = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)"
    python(home, "-c", load, str(hostile))
    assert (home / "marker").read_text() == "ran"
