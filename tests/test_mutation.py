"""The measurement of tests/mutation.py: its page says what was measured, and nothing is left unexplained."""

from pathlib import Path
from typing import Any

import pytest

from tests import mutation
from tools.errors import BadInput
from tools.files import read_json

DOCS = Path(__file__).parent.parent / "docs"


def test_nine_of_ten_mutants_are_killed_and_the_others_explained() -> None:
    results = read_json(DOCS / "mutation.json")
    assert list(results["modules"]) == list(mutation.TESTS)
    for module, found in results["modules"].items():
        assert found["killed"] + found["timeout"] + found["survived"] == found["mutants"], module
        assert found["killed"] + found["timeout"] >= 0.9 * found["mutants"], module
        assert len(found["survivors"]) == found["survived"], module
        assert [each for each in found["survivors"] if not each["reason"]] == [], module


def test_the_page_is_that_of_the_measurement() -> None:
    assert (DOCS / "mutation.md").read_text() == mutation.markdown(read_json(DOCS / "mutation.json"))


def test_a_mutant_is_described_by_its_line_and_function() -> None:
    original = "LIMIT = 3\n\n\ndef outer(x):\n    def inner():\n        return x + 1\n\n    return inner()\n"
    assert mutation.described(original, original.replace("+", "-"))[1:] == (6, "inner", "return x + 1", "return x - 1")
    assert mutation.described(original, original.replace("3", "4"))[1:] == (1, "", "LIMIT = 3", "LIMIT = 4")
    changed = original.replace("return inner()", "return None")
    assert mutation.described(original, changed)[1:] == (8, "outer", "return inner()", "return None")


@pytest.mark.parametrize(
    ("body", "limits", "outcome"),
    [
        ("assert True", {"cpu_seconds": 60}, "survived"),
        ("assert False", {"cpu_seconds": 60}, "killed"),
        ("while True: pass", {"cpu_seconds": 2}, "timeout"),
        ("time.sleep(60)", {"cpu_seconds": 60, "seconds": 2.0}, "timeout"),
    ],
)
def test_tests_run_in_a_fork(body: str, limits: dict[str, Any], outcome: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(f"import time\n\ndef test_x():\n    {body}\n")
    assert mutation.outcome_of([str(tmp_path / "test_x.py")], **limits) == outcome


def test_reasons_are_kept_for_what_still_survives() -> None:
    found = {"line": 7, "function": "f", "before": "a", "after": "b"}
    earlier = {"survivors": [{**found, "line": 3, "reason": "equal"}, {**found, "after": "c", "reason": "gone"}]}
    measured = {"survivors": [found, {**found, "before": "x"}]}
    reasons = [each["reason"] for each in mutation.with_reasons(measured, earlier)["survivors"]]
    assert reasons == ["equal", ""]


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--modules tools/files\.py has no tests here"):
        mutation.Config(modules=("tools/files.py",))
