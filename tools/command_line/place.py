"""Where the user stands: a relative path that was typed is seen from there.

The scripts go to the repository's root before they start a command, and the paths that they put in are relative to it.
So `scripts/env.sh` tells each command in TYPED how many of its last words the user typed, and in which folder. For
example, "2 /home/me/photos" stands for `add_pictures.sh --skip-known holiday`, typed in /home/me/photos. SETTINGS holds
the dataset's name, and behind it the variables that the user set, as they are typed: "folder DATASET=folder ". A script
that starts the others says in STARTED_BY how it was started.
"""

import dataclasses
import os
import re
import shlex
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[2]
VARIABLE = "TYPED"
SETTINGS = "SETTINGS"
STARTED_BY = "STARTED_BY"
_ASSIGNED = r"(?<![\w./-])((?:[A-Z_]+=(?:'[^']*'|\"[^\"]*\"|\\.|[^\s'\\])* )*)"
SCRIPT = re.compile(_ASSIGNED + r"(?:bash )?(?<![\w./-])(scripts/(?!datasets/)[\w/]+\.sh)")
STAGE_FOLDER = re.compile(r"[\w-]+/(?:output|data)/([^/]+)/(?:ablations/([^/]+)/)?\d\d_.*")

NAME_OR_PATH: Literal["name or path"] = "name or path"
NameOrPath = Annotated[str, NAME_OR_PATH]
"""The type of an option that takes a model's name, or the path of a file or folder."""

Kind = Literal["path", "name or path", "switch", "other"]


def in_checkout() -> bool:
    """Whether this code is the repository's, and no installed package's."""
    return (ROOT / "scripts").is_dir()


def user_folder() -> Path:
    """The folder in which the user typed the command; the current folder where no script said so."""
    _, folder = _typed()
    return folder


def typed_elsewhere() -> bool:
    """Whether some words were typed in another folder than the one in which the command runs."""
    count, folder = _typed()
    return count > 0 and not _is_here(folder)


def for_user(path: Path) -> Path:
    """A path as the user can use it: absolute where the user stands in another folder than the command."""
    return path if _is_here(user_folder()) else Path(os.path.abspath(path))  # noqa: PTH100, links stay


def typed_here(config_type: type[Any], arguments: Sequence[str]) -> list[str]:
    """A command's words with the paths that the user typed as they are seen from the current folder.

    It may be asked once in a process: afterwards no word counts as typed, so that commands which this one starts leave
    their own words alone.
    """
    count, folder = _typed()
    os.environ[VARIABLE] = f"0 {folder}"
    if not count or _is_here(folder):
        return list(arguments)
    first = len(arguments) - count
    words = list(arguments)
    for place, start, kind in _values(config_type, arguments):
        if place >= first:
            words[place] = words[place][:start] + _seen(words[place][start:], kind, folder)
    return words


def seen_from(folder: Path, path: str) -> str:
    """A path that is relative to `folder`, as seen from the current folder: absolute unless it lies below that one.

    Links are followed in the folder's own name only; "../x" is beside the folder in which links lead.
    """
    parts, base = list(Path(path).parts), folder.resolve()
    while parts[:1] == [".."]:
        parts, base = parts[1:], base.parent
    whole, here = base.joinpath(*parts), Path.cwd().resolve()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)


def with_commands(message: str) -> str:
    """A message that names scripts, with what the user types to start them in their place.

    The variables that the user set stand before a script, unless the message has others there. Where the user stands
    elsewhere than in the repository's root, a script is a whole path. An installed package has no scripts, and the
    message says where they are.
    """
    if not in_checkout():
        return (
            f"{message} (scripts/ is part of the repository, not of this package)"
            if SCRIPT.search(message)
            else message
        )
    at_root = user_folder().resolve() == ROOT.resolve()
    settings = _assigned(_settings()[1])

    def typed(found: re.Match[str]) -> str:
        path = found[2] if at_root else shlex.quote(str(ROOT / found[2]))
        return f"{found[1] or settings}bash {path}"

    return SCRIPT.sub(typed, message)


def variables_of(folder: Path) -> str:
    """The variables with which scripts write a run folder, as they are typed before one.

    They are those of the user, but for what the folder's path says: its DATASET, its ABLATION and its SYSTEM.
    """
    dataset, variables = _settings()
    place = _stage_folder(folder)
    if place and place[1] != dataset and (ROOT / "scripts" / "datasets" / f"{place[1]}.sh").is_file():
        variables = {"DATASET": place[1]}
    if place and (place[2] or "") != variables.get("ABLATION", ""):
        variables["ABLATION"] = place[2] or ""
    if re.match(r"\d\d_", folder.parent.name) and not re.match(r"\d\d_", folder.name):
        variables["SYSTEM"] = folder.name
    return _assigned(variables)


def users_variables(**others: str) -> str:
    """The variables that the user set, with others in the place of theirs, as they are typed before a script."""
    return _assigned(_settings()[1] | others)


def is_untouched(folder: Path) -> bool:
    """Whether a run folder belongs to a dataset of which nothing has been made beside it."""
    place = _stage_folder(folder)
    return place is not None and not (ROOT / place[0][: place.end(1)]).exists()


def started_by() -> str:
    """The script that started this one with others, with its options; empty where the user started it."""
    return os.environ.get(STARTED_BY, "")


def _stage_folder(folder: Path) -> re.Match[str] | None:
    """The path of a run folder that a script writes, with its dataset and its ABLATION."""
    path = folder.absolute()
    return STAGE_FOLDER.fullmatch(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None


def _settings() -> tuple[str, dict[str, str]]:
    """The dataset's name, and the variables that the user set; of a command without a script, nothing is known."""
    name, _, assigned = os.environ.get(SETTINGS, "").partition(" ")
    pairs = (word.partition("=") for word in shlex.split(assigned))
    return name, {variable: value for variable, _, value in pairs}


def _assigned(variables: dict[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value) if value else ''} " for name, value in variables.items())


def _typed() -> tuple[int, Path]:
    """How many words the user typed, and in which folder."""
    count, _, folder = os.environ.get(VARIABLE, "").partition(" ")
    return (int(count), Path(folder)) if count.isdecimal() and folder else (0, Path.cwd())


def _is_here(folder: Path) -> bool:
    return folder.resolve() == Path.cwd().resolve()


def _seen(value: str, kind: Kind, folder: Path) -> str:
    if kind == "path" and value != "None":
        return seen_from(folder, value)
    if kind == NAME_OR_PATH and (value.startswith(("./", "../")) or os.path.lexists(folder / value)):
        return seen_from(folder, value)
    return value


def _values(config_type: type[Any], arguments: Sequence[str]) -> Iterator[tuple[int, int, Kind]]:
    """Each value among a command's words: its word, the character where it begins in it, and its kind.

    An option takes the words that the parser gives it: none for a switch, all up to the next option where it takes
    several, else one. All other words are positional.
    """
    hints = get_type_hints(config_type, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(config_type)}
    positional = [hint for hint in fields.values() if _is_positional(hint)]
    taking: Kind = "other"  # the kind of the last option's values,
    left, options = 0, True  # how many it still takes, and whether options are still read
    for place, word in enumerate(arguments):
        if options and word == "--":
            options, left = False, 0
        elif options and word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            hint = fields.get(name.replace("-", "_"))
            taking = _kind(hint)
            left = 0 if taking == "switch" or hint is None else len(arguments) if _takes_several(hint) else 1
            if equals:
                yield place, word.index("=") + 1, taking
                left = 0
        elif left:
            left -= 1
            yield place, 0, taking
        elif positional:
            yield place, 0, _kind(positional[0])
            if not _takes_several(positional[0]):
                positional = positional[1:]


def _is_positional(hint: Any) -> bool:
    from tyro.conf import Positional  # not loaded where no word is typed

    return get_origin(hint) is Annotated and Positional in get_args(hint)[1:]


def _takes_several(hint: Any) -> bool:
    return get_origin(_plain(hint)) is tuple


def _kind(hint: Any) -> Kind:
    hint = _plain(hint)
    if hint is bool:
        return "switch"
    if hint is Path:
        return "path"
    if get_origin(hint) is tuple:
        return _kind(get_args(hint)[0])
    return NAME_OR_PATH if get_origin(hint) is Annotated and NAME_OR_PATH in get_args(hint)[1:] else "other"


def _plain(hint: Any) -> Any:
    """A type without "or None", and without what marks it as positional."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        return _plain(inner[0]) if len(inner) == 1 else hint
    return _plain(get_args(hint)[0]) if _is_positional(hint) else hint
