from collections import Counter

import pytest

from fastbert.models import forward

# What the common tests ask for and the fast path leaves to HuggingFace, as docs/design.md lists it. Any other forward
# is eligible: training and gradients, hidden states, masks with holes, inputs_embeds, chunks.
BY_DESIGN = (
    "eager attention was asked for",
    "attentions were asked for",
    "column 0 of a row is masked",  # left padding
    'pad_output="exact" and the batch has padding',  # question answering
    "labels other than -100 stand at masked positions",  # the loss reads pad rows
    "labels were given to a causal head",
    "a hook is set on",  # the tests of gradient checkpointing watch layers by hooks
    "MPNet adds a bias by relative position",
    "output_hidden_states is no flag",  # versions before 5.20 capture no states by their index
)
MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "is_training_test", "order",
         "torch_compile_test", "torch_export_test")  # fmt: skip


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: HuggingFace's own")


def by_design(reason: str) -> bool:
    return any(part.startswith(BY_DESIGN) for part in reason.split("; "))


class Record:
    """Outcomes by family and package, and forwards of our models by family and reason ("": fast)."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, Counter[str]]] = {}
        self.forwards: dict[str, Counter[str]] = {}

    def eligible(self, family: str) -> Counter[str]:
        """The forwards of a family that nothing keeps from the fast path by design."""
        found = self.forwards.get(family, Counter())
        return Counter({reason: calls for reason, calls in found.items() if not by_design(reason)})


KEY = pytest.StashKey[Record]()


@pytest.fixture(scope="session")
def record(pytestconfig):
    return pytestconfig.stash.setdefault(KEY, Record())


@pytest.fixture
def count_forwards(record, monkeypatch):
    """A function that counts the forwards of all accelerated models made from now on for a family."""

    def count(family):
        total = record.forwards.setdefault(family, Counter())

        kept = forward.State.count

        def counting(state, reason):
            total[reason] += 1
            kept(state, reason)

        monkeypatch.setattr(forward.State, "count", counting)

    return count


def pytest_terminal_summary(terminalreporter, config):
    if KEY not in config.stash:
        return
    found = config.stash[KEY]
    terminalreporter.section("HuggingFace's common model tests")
    for family, packages in found.outcomes.items():
        counts = (f"{package} {dict(sorted(kinds.items()))}" for package, kinds in packages.items())
        terminalreporter.write_line(f"{family}: {', '.join(counts)}")
        eligible, forwards = found.eligible(family), found.forwards[family]
        share = f"{eligible['']} of {eligible.total()} eligible forwards on the fast path"
        terminalreporter.write_line(f"    {share}; {forwards.total() - eligible.total()} not eligible")
    reasons = sum(found.forwards.values(), Counter())
    for reason, calls in reasons.most_common():
        terminalreporter.write_line(f"  {calls:6} forwards: {reason or 'fast'}")
