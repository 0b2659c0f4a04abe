"""How `pip install .` makes one package, `avg`, of the rooms that a search needs.

In the checkout, the rooms `models`, `tools` and `retriever` are top-level packages that import each other by these
names. Installed like that, they would take the place of other people's `models` and `tools`. So the build puts them
below `avg` and rewrites these imports: `from tools import runs` becomes `from avg.tools import runs`. Only modules that
`avg` reaches through imports are installed. The checkout itself stays as it is.
"""

import ast
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

PACKAGE = "avg"
SOURCES = {"package": PACKAGE, "models": "avg.models", "tools": "avg.tools", "retriever": "avg.retriever"}
"""Each folder of the checkout, and the name under which it is installed."""
ENTRIES = ("package", "package.__main__")


class BuildPy(build_py):
    """Copies the modules that are reached, with their imports rewritten."""

    @cached_property
    def reached(self) -> set[Path]:
        return set(reach(Path(), ENTRIES).values())

    def run(self) -> None:
        missing = {installed_package(path) for path in self.reached} - set(self.packages)
        if missing:
            raise SetupError(f"pyproject.toml: add {', '.join(sorted(missing))} to tool.setuptools.packages")
        shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)  # an earlier build may have had more modules
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if Path(module[2]) in self.reached]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        copy, copied = super().build_module(module, module_file, package)
        Path(copy).write_text(rewritten(Path(module_file).read_text(encoding="utf-8"), module_file), encoding="utf-8")
        return copy, copied


class EditableWheel(editable_wheel):
    """Refuses `pip install --editable`: the rooms could be imported only under their own names."""

    def run(self) -> None:
        raise SetupError("avg cannot be installed as editable: use `pip install .`, or run commands in the checkout")


def reach(root: Path, entries: tuple[str, ...]) -> dict[str, Path]:
    """Modules that some modules of the checkout import, directly or not, and these themselves, with their files.

    Raises:
        SetupError: a module that is imported is not there.
    """
    found: dict[str, Path] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = module_file(root, name)
        if path is None:
            raise SetupError(f"{name} is imported, but is no module of the checkout")
        found[name] = path.relative_to(root)
        parent = name.rpartition(".")[0]
        waiting += [*([parent] if parent else []), *imported(root, name, path)]
    return found


def imported(root: Path, name: str, path: Path) -> Iterator[str]:
    """Modules of the checkout that a module imports, those in functions included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if room_of(alias.name) in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            if room_of(base) in SOURCES:
                yield base
                inner = (f"{base}.{alias.name}" for alias in node.names)
                yield from (each for each in inner if module_file(root, each) is not None)


def module_file(root: Path, name: str) -> Path | None:
    """The file of a module of the checkout, by its name there."""
    path = root / name.replace(".", "/")
    return next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)


def rewritten(source: str, file: str) -> str:
    """A module's source with absolute imports of rooms below `avg`; nothing else changes.

    Args:
        file: its name, for errors.

    Raises:
        SetupError: an import has a form that cannot be rewritten.
    """
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and room_of(node.module) in SOURCES:
            new = installed(node.module)
            replace(lines, node, f"from {node.module} ", f"from {new} ", file)
            node.module = new
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if room_of(alias.name) in SOURCES:
                    if alias.asname is None:
                        raise SetupError(f"{file}, line {node.lineno}: write `from ... import`, or `import ... as`")
                    new = installed(alias.name)
                    replace(lines, alias, f"{alias.name} as ", f"{new} as ", file)
                    alias.name = new
    text = "".join(lines)
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise SetupError(f"{file}: its imports could not be rewritten")
    return text


def replace(lines: list[str], node: ast.stmt | ast.alias, old: str, new: str, file: str) -> None:
    """Put a text in the place of another where a node begins."""
    number, column = node.lineno - 1, len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
    before, after = lines[number][:column], lines[number][column:]
    if not after.startswith(old):
        raise SetupError(f"{file}, line {node.lineno}: write this import on one line, with single spaces")
    lines[number] = before + new + after.removeprefix(old)


def installed(name: str) -> str:
    """The name of a module of the checkout when it is installed.

    >>> installed("tools.command_line.place")
    'avg.tools.command_line.place'
    """
    return SOURCES[room_of(name)] + name.removeprefix(room_of(name))


def installed_package(path: Path) -> str:
    """The installed package that a file of the checkout goes into."""
    return installed(".".join(path.parent.parts))


def room_of(name: str) -> str:
    return name.partition(".")[0]
