"""What README.md and the other pages say is true: their Python is type-checked and run, their commands and paths exist.

A Python block that begins with an import stands alone; any other goes on from the block before it, and both are one
program. Programs run offline in an empty folder, in which a tiny random checkpoint lies under each name that they load.
"""

import ast
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from fastbert import cli
from fastbert.models.families import FAMILIES
from tests.build.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels/README.md", *ROOT.glob("docs/*.md")])
BUILT = {"fastbert/_native.so", "fastbert/_native.json", "fastbert/kernels/", "fastbert-bench.png"}  # in no checkout
SHELLS = ("", "sh", "bash", "shell", "console")


def each_page(check):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(check)


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def inline(text: str) -> Iterator[Token]:
    for token in tokens(text):
        yield from token.children or ()


# Python


@dataclass(frozen=True)
class Program:
    """One or more blocks of a page, on the lines where they stand there; every other line is empty."""

    page: Path
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}" if self.page.is_relative_to(ROOT) else self.page.name


def begins_with_an_import(source: str) -> bool:
    body = ast.parse(source).body
    return bool(body) and isinstance(body[0], (ast.Import, ast.ImportFrom))


def programs(page: Path) -> list[Program]:
    found: list[Program] = []
    for token in tokens(page.read_text(encoding="utf-8")):
        if token.type != "fence" or token.info.split()[:1] not in (["python"], ["py"]):
            continue
        assert token.map is not None
        line = token.map[0] + 2
        if found and not begins_with_an_import(token.content):
            before = found.pop()
            gap = "\n" * (line - 1 - before.source.count("\n"))
            found.append(Program(page, before.line, before.source + gap + token.content))
        else:
            found.append(Program(page, line, "\n" * (line - 1) + token.content))
    return found


PROGRAMS = [program for page in PAGES for program in programs(page)]


def test_readme_begins_with_an_example() -> None:
    assert any(program.page == ROOT / "README.md" for program in PROGRAMS)


def type_errors(found: list[Program], folder: Path) -> str:
    """What mypy, strict as for the package, says of programs; the names of its files tell page and line."""
    names = [folder / f"{program.page.stem.lower()}_{program.line}.py" for program in found]
    for name, program in zip(names, found, strict=True):
        name.write_text(program.source, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-warn-unused-configs", *map(str, names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_programs_have_right_types(tmp_path: Path) -> None:
    assert type_errors(PROGRAMS, tmp_path) == ""


def checkpoint_names(source: str) -> set[str]:
    """The checkpoints that a program loads by name: of from_pretrained, SentenceTransformer and pipeline."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).split(".")[-1]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in ("from_pretrained", "SentenceTransformer", "CrossEncoder"):
            value = node.args[0] if node.args else keywords.get("pretrained_model_name_or_path")
        elif called == "pipeline":
            value = keywords.get("model")
        else:
            continue
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found.add(value.value)
    return found


def save_checkpoint(folder: Path) -> None:
    """A tiny random model with its tokenizer, of the family that the folder's name tells, else BERT."""
    name = folder.name.lower().replace("-", "")
    kinds = [family.name for family in FAMILIES if family.name.replace("-", "") in name]
    kind = max(kinds, key=len, default="bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *"abcdefghijklmnopqrstuvwxyz.,!?", "the", "of", "a", "is"]
    sizes = {"vocab_size": len(words), "max_position_embeddings": 514, "type_vocab_size": 2, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 48}  # distilbert's
    torch.manual_seed(0)
    transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    if kind == "distilbert":
        fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)


def run(program: Program, folder: Path) -> subprocess.CompletedProcess[str]:
    for name in checkpoint_names(program.source):
        save_checkpoint(folder / name)
    script = folder / f"{program.page.stem.lower()}.py"
    script.write_text(program.source, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, script.name]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_programs_run(program: Program, tmp_path: Path) -> None:
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# Commands


def commands(text: str) -> list[list[str]]:
    """What a page has a reader type: lines of shell blocks, and code in a line that begins with one of our commands."""
    lines = [token.content for token in inline(text) if token.type == "code_inline"]
    lines = [line for line in lines if re.match(r"(fastbert|make|python -m|nox|pip install) ", line)]
    for token in tokens(text):
        if token.type == "fence" and token.info.strip() in SHELLS:
            lines += [line.strip().removeprefix("$ ") for line in token.content.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        try:
            words = shlex.split(line.replace("…", "..."), comments=True)
        except ValueError:  # a formula, not a command
            continue
        found.append([])
        for word in words:
            if word in ("&&", "||", "|", ";"):
                found.append([])
            else:
                found[-1].append(word)
    return [command for command in found if command]


def options_of(words: list[str]) -> list[str]:
    return [word.strip("[]").split("=")[0] for word in words if re.match(r"\[?-[-\w]", word)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def command_problem(words: list[str]) -> str:
    """ "" or why a command of a page cannot be typed; commands of other projects are not looked at"""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, rest = (Path(words[0]).name, words[1:]) if words else ("", [])
    if program == "fastbert":
        return fastbert_problem(rest)
    if program == "make":
        unknown = [word for word in rest if "=" not in word and word[0] not in "-.[" and word not in make_targets()]
        return f"make has no target {unknown[0]}" if unknown else ""
    if re.fullmatch(r"python[\d.]*", program) and rest[:1] == ["-m"] and len(rest) > 1:
        return module_problem(rest[1], options_of(rest[2:]))
    if program == "pip":
        return pip_problem(" ".join(rest))
    return ""


def fastbert_problem(rest: list[str]) -> str:
    group = typer.main.get_command(cli.app)
    known = {option for parameter in group.params for option in parameter.opts} | {"--help", "-h"}
    if rest and not rest[0].startswith(("-", "[", ".")):
        if rest[0] not in group.commands:
            return f"fastbert has no command {rest[0]}"
        known = {option for parameter in group.commands[rest[0]].params for option in parameter.opts} | {"--help", "-h"}
    unknown = [option for option in options_of(rest) if option not in known]
    return f"fastbert {rest[0]} has no option {unknown[0]}" if unknown else ""


def module_problem(module: str, options: list[str]) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return f"there is no module {module}"
    if module.split(".")[0] not in ("fastbert", "benchmarks", "tests") or spec.origin is None:
        return ""
    unknown = [option for option in options if f'"{option}"' not in Path(spec.origin).read_text()]
    return f"{module} has no option {unknown[0]}" if unknown else ""


def pip_problem(arguments: str) -> str:
    pyproject = (ROOT / "pyproject.toml").read_text()  # tomllib comes with Python 3.11
    optional = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extras in re.findall(r"(?:fastbert[\w-]*|\.)\[([\w,-]+)\]", arguments):
        for extra in extras.split(","):
            if not re.search(rf"^{extra} = ", optional, re.MULTILINE):
                return f"there is no extra {extra}"
    return ""


@each_page
def test_commands_exist(page: Path) -> None:
    found = [command_problem(command) for command in commands(page.read_text(encoding="utf-8"))]
    assert [problem for problem in found if problem] == []


@pytest.mark.parametrize("name", ["", *typer.main.get_command(cli.app).commands])
def test_help_parses(name: str) -> None:
    assert CliRunner().invoke(cli.app, [*name.split(), "--help"]).exit_code == 0


# Links and paths


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = tokens(text)
    titles = [after.content for token, after in itertools.pairwise(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, page: Path) -> list[str]:
    links = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in inline(text)]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if not link or re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
            continue
        other = text if target == page else target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
        if anchor and anchor not in heading_anchors(other):
            broken.append(link)
    return broken


@each_page
def test_links_and_images_exist(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


def missing_paths(text: str) -> list[str]:
    """Files and folders in backticks that are not there; `<op>`, `*` and `…` stand for anything.

    A path whose first folder is not the repository's (a hub id, a file of another project) is not looked at, unless it
    ends with a slash. A bare name of a source file may lie anywhere in the repository.
    """
    names = [token.content for token in inline(text) if token.type == "code_inline"]
    missing = []
    for name in dict.fromkeys(names):
        if not re.fullmatch(r"[\w.*<>/…-]+", name) or name in BUILT or name.startswith(("/", ".", "-")):
            continue
        pattern = re.sub(r"<\w+>|…", "*", name)
        if "/" in name:
            ours = (ROOT / name.split("/")[0]).exists() or name.endswith("/")
            if ours and not any(ROOT.glob(pattern.rstrip("/"))):
                missing.append(name)
        elif re.search(r"\.(py|cu|cpp|h|md|toml)$", name):
            folders = ("fastbert", "kernels", "csrc", "tests", "benchmarks", "docs")
            if not any(ROOT.glob(pattern)) and not any(any((ROOT / f).rglob(pattern)) for f in folders):
                missing.append(name)
    return missing


@each_page
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


# What is wrong in a page is found

WRONG = """
# A title, with `code`

See [this](missing.md), [that](#no-such-title), [this title](#a-title-with-code) and ![it](docs/missing.png).
`fastbert missing`, `fastbert bench --missing`, `make missing`, `python -m benchmarks.missing`, `fastbert doctor`.
In `fastbert/missing.py`, `missing.py`, `missing/`, `tests/<room>/`, `sentence-transformers/all`, `test_readme.py`.

```python
import fastbert

restored: int = fastbert.restore
```

```python
raise SystemExit(restored is not fastbert.restore or 7)
```

```
make test PYTHON=python3 && make nothing   # a comment
pip install fastbert-kernels[demo,nothing]
$ python -m benchmarks.gpu_record --dry-run --nothing
```
"""


def test_wrong_pages_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text(WRONG, encoding="utf-8")
    assert broken_links(WRONG, page) == ["missing.md", "#no-such-title", "docs/missing.png"]
    assert missing_paths(WRONG) == ["fastbert/missing.py", "missing.py", "missing/"]
    assert [problem for command in commands(WRONG) if (problem := command_problem(command))] == [
        "fastbert has no command missing",
        "fastbert bench has no option --missing",
        "make has no target missing",
        "there is no module benchmarks.missing",
        "make has no target nothing",
        "there is no extra nothing",
        "benchmarks.gpu_record has no option --nothing",
    ]
    (program,) = programs(page)
    assert program.source.splitlines()[program.line - 1] == "import fastbert"
    wrong = WRONG.splitlines().index("restored: int = fastbert.restore") + 1
    assert program.source.splitlines()[wrong - 1] == "restored: int = fastbert.restore"
    assert run(program, tmp_path).returncode == 7
    assert f"wrong_{program.line}.py:{wrong}: error: Incompatible types" in type_errors([program], tmp_path)
