"""Mutation testing of the core: a small error is put in at a time, and a module's own tests should notice it.

mutmut's operators make the mutants. Its own runner leaves decorated functions out, such as the beam search and most of
the quantizer, and constants, because it switches between copies of a function. So here each mutant is written into a
copy of the repository and tested in a fork of this process, which has loaded the libraries already.

In:  the modules and the tests of each, `TESTS`; the reasons for survivors in `<output>/mutation.json`, which are kept.
Out: `<output>/mutation.json` (counts, survivors), `<output>/mutation.md` (the same for people).
Command: bash scripts/mutation.sh [--modules tools/recall.py] [--render]
"""

import ast
import contextlib
import difflib
import gc
import importlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.files import hash_file, read_json, replacing, write_json
from tools.logs import progress

Outcome = Literal["killed", "timeout", "survived"]

ROOT = Path(__file__).parent.parent
PROJECT = ("models", "tools", "retriever", "reranker", "RQ-VAE", "tests")
LEAST_SECONDS, PATIENCE = 10, 10  # a mutant may take this long, and this many times what the tests take without it
LONGEST_SECONDS = 600.0  # for one that waits instead of working
POLL_SECONDS = 0.005

TESTS = {
    "retriever/index.py": ["tests/test_index.py"],
    "retriever/beam.py": ["tests/test_beam.py"],
    "models/quantizer.py": ["tests/test_quantizer.py"],
    "tools/recall.py": ["tests/test_recall.py"],
    "tools/runs.py": ["tests/test_manifests.py", "tests/test_runs.py", "tests/test_finished.py"],
}


@dataclass(frozen=True)
class Config:
    """What is measured."""

    modules: tuple[str, ...] = tuple(TESTS)
    """Files to mutate; the figures of the others stay as they are."""
    output: Path = ROOT / "docs"
    """Folder of the results."""
    survivors: bool = False
    """Test those again that survived before, and count the others as before: enough where tests were only added."""
    render: bool = False
    """Measure nothing: only write mutation.md anew, after reasons were written into mutation.json."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.modules) - set(TESTS)):
            raise BadInput(f"--modules {unknown[0]} has no tests here, choose among {' '.join(TESTS)}")


class Mutant(NamedTuple):
    """A module with one small error in it."""

    source: str
    line: int
    function: str
    """Empty outside functions."""
    before: str
    after: str


def mutants_of(module: Path) -> list[Mutant]:
    """Every mutant that mutmut's operators make of a file, each once."""
    operators: Any = importlib.import_module("mutmut.mutation.file_mutation")
    libcst: Any = importlib.import_module("libcst")

    class Visitor(operators.MutationVisitor):
        """mutmut's, but decorated functions are gone into as well; the decorators stay."""

        def _skip_node_and_children(self, node: Any) -> bool:
            decorated = isinstance(node, libcst.FunctionDef) and bool(node.decorators)
            return not decorated and super()._skip_node_and_children(node)

    operators.MutationVisitor = Visitor
    original = module.read_text(encoding="utf-8")
    tree, changes, *_ = operators.create_mutations(str(module), original)
    seen = {ast.dump(ast.parse(original))}
    places = {id(node): place for place, statement in enumerate(tree.body) for node in _with_children(statement)}
    parts = [tree.code_for_node(statement) for statement in tree.body]
    head = original.removesuffix("".join(parts))
    assert head != original, f"{module} ends in comments"
    found = []
    for change in changes:
        place = places[id(change.original_node)]
        changed = operators.deep_replace(tree.body[place], change.original_node, change.mutated_node)
        source = "".join([head, *parts[:place], tree.code_for_node(changed), *parts[place + 1 :]])
        try:
            meaning = ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if meaning not in seen:
            seen.add(meaning)
            found.append(described(original, source))
    return found


def _with_children(node: Any) -> Iterator[Any]:
    yield node
    for child in node.children:
        yield from _with_children(child)


def described(original: str, source: str) -> Mutant:
    """A mutant with its line, the function that is in, and the lines before and after."""
    lines = list(difflib.unified_diff(original.splitlines(), source.splitlines(), lineterm="", n=0))
    line = int(lines[2].split()[1].lstrip("-").partition(",")[0])
    before, after = (" ".join(text[1:].strip() for text in lines[3:] if text.startswith(sign)) for sign in ("-", "+"))
    around = [node for node in _functions(original) if node.lineno <= line <= (node.end_lineno or 0)]
    return Mutant(source, line, max(around, key=lambda node: node.lineno).name if around else "", before, after)


@cache
def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def copy_repository(folder: Path) -> None:
    """Copy what git knows or would take, and say to mutmut where code is."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (folder / "setup.cfg").write_text("[mutmut]\nsource_paths=models\n")


def load_libraries(module: str) -> None:
    """Import what a module's tests import, and forget the project's own part of it: each fork loads that anew."""
    import hypothesis
    import pytest
    import torch

    sys.dont_write_bytecode = False
    torch.set_num_threads(1)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # one failing example is enough, however long
    hypothesis.settings.register_profile("mutation", database=None, derandomize=True, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", *TESTS[module]])  # which also compiles everything, once
    for compiled in Path(module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
        compiled.unlink()
    sys.dont_write_bytecode = True
    for name in list(sys.modules):
        if name.partition(".")[0] in PROJECT and name != __name__:
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # no fork goes through the libraries' objects again


def outcome_of(tests: list[str], *, cpu_seconds: int, seconds: float = LONGEST_SECONDS) -> Outcome:
    """Run the tests in a fork.

    Args:
        cpu_seconds: it may take of a processor's time, which does not depend on what else the machine does.
        seconds: it may take on the clock.
    """
    child = os.fork()
    if not child:
        _run_tests(tests, cpu_seconds)
    ends = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return "timeout"
        if done:
            return "survived" if status == 0 else "killed"
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(POLL_SECONDS)


def _run_tests(tests: list[str], cpu_seconds: int) -> None:
    """What a fork does; it never returns."""
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        status = int(pytest.main(["-x", *tests]))
    finally:
        os._exit(status)


def measure(module: str, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Test the mutants of one module of the repository in the current folder. Returns counts and survivors.

    Args:
        earlier: a measurement of the same module: only its survivors are tested again.
    """
    tests, path = TESTS[module], Path(module)
    load_libraries(module)
    before = _children_seconds()
    if outcome_of(tests, cpu_seconds=600) != "survived":
        raise BadInput(f"the tests of {module} fail without a mutant: run python -m pytest {' '.join(tests)}")
    cpu_seconds = max(LEAST_SECONDS, round(PATIENCE * (_children_seconds() - before)))
    mutants, source = mutants_of(path), hash_file(path)
    original, every = path.read_text(encoding="utf-8"), len(mutants)
    counts: dict[Outcome, int] = {"killed": 0, "timeout": 0, "survived": 0}
    spent, before = 0.0, _children_seconds()
    if earlier is not None:
        if earlier["source"] != source:
            raise BadInput(f"{module} is not the one that was measured: leave --survivors out")
        left = {(each["line"], each["before"], each["after"]) for each in earlier["survivors"]}
        mutants = [mutant for mutant in mutants if (mutant.line, mutant.before, mutant.after) in left]
        counts["killed"], counts["timeout"] = earlier["killed"], earlier["timeout"]
        spent = earlier["cpu_seconds"]
    survivors = []
    for mutant in progress(mutants, module, unit="mutant"):
        path.write_text(mutant.source, encoding="utf-8")
        outcome = outcome_of(tests, cpu_seconds=cpu_seconds)
        counts[outcome] += 1
        if outcome == "survived":
            survivors.append({name: getattr(mutant, name) for name in ("line", "function", "before", "after")})
    path.write_text(original, encoding="utf-8")
    gc.unfreeze()
    return {
        "source": source,
        "tests": tests,
        "mutants": every,
        **{str(outcome): count for outcome, count in counts.items()},
        "cpu_seconds": round(spent + _children_seconds() - before),
        "survivors": survivors,
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def with_reasons(measured: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The same with the reasons that an earlier measurement had for its survivors."""
    known = {(each["before"], each["after"]): each["reason"] for each in earlier.get("survivors", [])}
    survivors = [{**each, "reason": known.get((each["before"], each["after"]), "")} for each in measured["survivors"]]
    return {**measured, "survivors": survivors}


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    return "\n".join([*_head(results), *_survivors(results)]) + "\n"


def _head(results: dict[str, Any]) -> Iterator[str]:
    yield "# Mutation testing"
    yield ""
    yield "Command: `bash scripts/mutation.sh`, which writes this page and `mutation.json`. Each module is tested by"
    yield f"its own tests alone (`tests/mutation.py` says how); the mutants are those of {results['tool']}. The prefix"
    yield "tree is `retriever/index.py`."
    yield ""
    yield "| module | tests | mutants | killed | by timeout | survived | share killed | CPU seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for module, found in results["modules"].items():
        tests = ", ".join(f"`{name}`" for name in found["tests"])
        killed = found["killed"] + found["timeout"]
        counts = [found["mutants"], killed, found["timeout"], found["survived"], f"{killed / found['mutants']:.1%}"]
        yield f"| `{module}` | {tests} | {' | '.join(map(str, counts))} | {found['cpu_seconds']} |"


def _survivors(results: dict[str, Any]) -> Iterator[str]:
    for module, found in results["modules"].items():
        yield f"\n## Survivors in `{module}`"
        reasons: dict[str, list[dict[str, Any]]] = {}
        for each in found["survivors"]:
            reasons.setdefault(each["reason"] or "Not explained yet.", []).append(each)
        for reason, those in reasons.items():
            yield f"\n{reason}\n\n```diff"
            for each in those:
                yield f"@@ line {each['line']}{each['function'] and ', '}{each['function']} @@"
                yield f"-{each['before']}\n+{each['after']}"
            yield "```"


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write both files, the modules in the order of `TESTS`."""
    ordered = {module: results["modules"][module] for module in TESTS if module in results["modules"]}
    write_json(folder / "mutation.json", {**results, "modules": ordered})
    with replacing(folder / "mutation.md") as temporary:
        temporary.write_text(markdown({**results, "modules": ordered}), encoding="utf-8")


def main(config: Config) -> None:
    path = config.output.resolve() / "mutation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = read_json(path) if path.is_file() else {"tool": "", "modules": {}}
    if config.render:
        write_results(path.parent, results)
        return
    results["tool"] = f"mutmut {importlib.import_module('mutmut').__version__}"
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        os.chdir(folder)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        for module in config.modules:
            before = results["modules"].get(module, {})
            results["modules"][module] = with_reasons(
                measure(module, before if config.survivors and before else None), before
            )
            write_results(path.parent, results)
        os.chdir(ROOT)
    print(markdown(results))


if __name__ == "__main__":
    run_command(main, Config)
