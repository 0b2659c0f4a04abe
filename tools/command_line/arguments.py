"""What is misspelt on a command line: named in one line, with the option or the choice that it resembles.

It runs before the parser, which would say more than a line, and repeat what stands behind an unknown option: perhaps a
key.
"""

import dataclasses
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import BadInput
from ..texts import did_you_mean, shortened

HELP = ("help",)


def check_arguments(config_type: type[Any], arguments: Sequence[str]) -> None:
    """Look for options that a command's configuration does not have, and for words that none of its choices are.

    Raises:
        BadInput: there is one.
    """
    fields = dataclasses.fields(config_type)
    hints = get_type_hints(config_type)
    switches = {f"no_{field.name}" for field in fields if hints[field.name] is bool}
    known: list[str] = [option(name) for name in sorted({field.name for field in fields} | switches | set(HELP))]
    for name, values in _options(arguments):
        if option(name) not in known:
            typed = shortened(option(name))
            near = did_you_mean(typed, known) or ": --help lists the options"
            raise BadInput(f"{typed} is not an option of this command{near}")
        choices = _choices(hints.get(name))
        several = get_origin(hints.get(name)) is tuple
        for value in (values if several else values[:1]) if choices else ():
            if value not in (*choices, "None"):
                near = did_you_mean(value, choices)
                raise BadInput(f"{option(name)} {shortened(value)}: choose of {', '.join(choices)}{near}")


def check_numbers(config: Any) -> None:
    """Look for values that are no numbers, which no comparison finds.

    Raises:
        BadInput: there is one.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if any(isinstance(each, float) and each != each for each in (value if isinstance(value, tuple) else (value,))):
            raise BadInput(f"{option(field.name)} nan is not a number: give one")


def option(name: str) -> str:
    """A field of a configuration as it is typed.

    >>> option("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def with_options(message: str, config_type: type[Any]) -> str:
    """A message that speaks of `arguments`, as the functions of models/ do, with options in their place.

    Words in backquotes that are no fields of the configuration stay as they are.
    """
    known = {field.name for field in dataclasses.fields(config_type)}
    return re.sub(r"`(\w+)`", lambda found: option(found[1]) if found[1] in known else found[0], message)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Field names, as they are typed, and the words behind each up to the next option."""
    name, values = None, []
    for argument in arguments:
        if argument.startswith("--tyro-"):  # the parser's own, for completion in shells
            continue
        if argument.startswith("--") and len(argument) > 2:
            if name is not None:
                yield name, values
            typed, equals, value = argument[2:].partition("=")
            name, values = typed.replace("-", "_"), [value] if equals else []
        elif name is not None:
            values.append(argument)
    if name is not None:
        yield name, values


def _choices(hint: Any) -> list[str]:
    """The words that an option takes, where it takes no others."""
    origin = get_origin(hint)
    if origin is Literal:
        return [str(each) for each in get_args(hint)]
    if origin in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        return _choices(inner[0]) if len(inner) == 1 else []
    if origin is tuple and get_args(hint)[1:] == (Ellipsis,):
        return _choices(get_args(hint)[0])
    return []
