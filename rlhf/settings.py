"""A frozen dataclass from YAML and flags, by jsonargparse; unknown keys are refused with the nearest one named."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf.config import STAGES
from rlhf.types import ConfigError

Config = TypeVar("Config")
Choices = Mapping[str, tuple[Sequence[str], str]]
"""Flags that are no settings: name -> allowed values, and what the flag does."""
OWN_FLAGS = ("help", "config", "print_config")


def parse(
    config_class: type[Config],
    arguments: Sequence[str],
    *,
    command: str,
    choices: Choices | None = None,
) -> tuple[Config, dict[str, str | None]]:
    """The config of a command line, and the values of its extra flags `choices` (name -> allowed values and help).

    YAML files named by `--config` come first, flags override them. `--help` and `--print_config` print and exit.
    Raises ConfigError naming the key, and for YAML the file and line.
    """
    keys = hints(config_class)
    _check_flags(arguments, [*keys, *(choices or {}), *OWN_FLAGS], keys)
    for path in _config_files(arguments):
        _check_yaml(path, keys)
    from argparse import ArgumentError

    try:
        chosen, rest = _take(choices or {}, arguments)
        values = _parser(config_class, command, choices or {}).parse_args(rest).as_dict()
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise ConfigError(_message(error, keys)) from error
    values.pop("config", None)
    return build(config_class, values), chosen


def nearest(word: str, words: Sequence[str], mark: str = "`{}`") -> str:
    """`: did you mean ...?` for the most similar of `words` (its last part counts too), or nothing."""
    found = get_close_matches(word, words, n=1, cutoff=0.6)
    if not found:
        last = word.rpartition(".")[2]
        tails = get_close_matches(last, [known.rpartition(".")[2] for known in words], n=1, cutoff=0.7)
        found = [known for known in words if tails and known.rpartition(".")[2] == tails[0]]
    return f": did you mean {mark.format(found[0])}?" if found else ""


@cache
def hints(config_class: type) -> dict[str, Any]:
    """Every dotted key of a config class with its type, those of nested dataclasses included."""
    found = {}
    types_of = get_type_hints(config_class)
    for each in fields(config_class):
        found[each.name] = types_of[each.name]
        for nested in _dataclasses(types_of[each.name]):
            found |= {f"{each.name}.{key}": hint for key, hint in hints(nested).items()}
    return found


def build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass from nested plain values; a ConfigError of one stage of many is prefixed with the stage's name."""
    types_of = get_type_hints(config_class)
    return config_class(**{name: _build_field(types_of[name], value, name) for name, value in values.items()})


def _build_field(hint: Any, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    for candidate in _dataclasses(hint):
        if set(value) <= {each.name for each in fields(candidate)}:
            try:
                return build(candidate, value)
            except ConfigError as error:
                if name not in STAGES:
                    raise
                raise ConfigError(f"{name}.{error}") from error
    return dict(value)


def _dataclasses(hint: Any) -> list[type]:
    """The dataclasses in a type or union of types."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [part for part in parts if isinstance(part, type) and is_dataclass(part)]


def _take(choices: Choices, arguments: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """The values of the flags that are no settings, and the other arguments."""
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name, (allowed, _) in choices.items():
        parser.add_argument(f"--{name}", choices=list(allowed))
    chosen, rest = parser.parse_known_args(list(arguments))
    return vars(chosen), rest


def _is_known(key: str, keys: Mapping[str, Any]) -> bool:
    """Whether `key` is a setting, or an entry of a setting that is a mapping (`columns.prompt`)."""
    return key in keys or get_origin(keys.get(key.rpartition(".")[0])) is dict


def _check_flags(arguments: Sequence[str], known: Sequence[str], keys: Mapping[str, Any]) -> None:
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name not in known and not _is_known(name, keys):
            raise ConfigError(f"there is no flag --{name}{nearest(name, known, '--{}')}")


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield argument.partition("=")[2]
        elif argument == "--config" and position + 1 < len(arguments):
            yield arguments[position + 1]


def _check_yaml(path: str, keys: Mapping[str, Any]) -> None:
    """Refuse a YAML file with unknown or doubled keys; raises ConfigError naming file and line."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_line(error)} is not valid YAML: {_reason(error)}") from error
    if root is None:
        raise ConfigError(f"{path} is empty: write one `key: value` a line, or leave out --config")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} holds no settings: write one `key: value` a line")
    seen: set[str] = set()
    for key, value, line in _yaml_keys(root):
        if not _is_known(key, keys):
            raise ConfigError(
                f"{path}, line {line}: there is no setting `{key}`{nearest(key, list(keys))}{_other(root, keys)}"
            )
        if key in seen:
            raise ConfigError(f"{path}, line {line}: `{key}` is set a second time: keep one of the two")
        if _is_group(keys.get(key)) and not isinstance(value, yaml.MappingNode):
            plain = isinstance(value, yaml.ScalarNode)
            found = repr(value.value) if plain and value.value else "empty" if plain else "a list"
            raise ConfigError(
                f"{path}, line {line}: `{key}` is {found}, but it holds settings of its own: write them indented "
                f"below it (`--print_config` shows them all)"
            )
        seen.add(key)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}," if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    """What the parser found, without its excerpt of the file."""
    found = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return found.replace("'\\t'", "a tab: indent with spaces; it") or " ".join(str(error).split())


def _yaml_keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, yaml.Node, int]]:
    """Dotted keys with their values and line numbers, in the file's order."""
    for key, value in node.value:
        name = f"{prefix}{key.value}" if isinstance(key, yaml.ScalarNode) else f"{prefix}?"
        yield name, value, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _yaml_keys(value, f"{name}.")


def _other(root: yaml.MappingNode, keys: Mapping[str, Any]) -> str:
    """A word to who gives one stage the YAML of all."""
    if not {key for key, _, _ in _yaml_keys(root)} & set(STAGES) - set(keys):
        return ""
    return " (this looks like the YAML of a whole pipeline: `rlhf run --config ... --only STAGE`)"


def _parser(config_class: type, command: str, choices: Choices) -> Any:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(DefaultHelpFormatter):
        """A setting's meaning, then its default; jsonargparse's own repeats the type."""

        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=40, width=110)

        def _get_help_string(self, action: Any) -> str:
            text = action.help or ""
            if action.dest not in keys or action.default in (None, {}) or "(default: " in text:
                return text
            return f"{text} (default: {str(action.default).replace('%', '%%')})".strip()

    keys = hints(config_class)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    flags = "".join(f"[--{name} {_shown(allowed)}] " for name, (allowed, _) in choices.items())
    parser = ArgumentParser(
        usage=f"rlhf {command} {flags}[--config FILE.yaml] [--key value ...]",
        description="; ".join(f"--{name}: {meaning}" for name, (_, meaning) in choices.items()) or None,
        exit_on_error=False,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML of the settings below; flags override it"
    )
    parser.add_class_arguments(config_class)
    _tidy(parser, keys)
    return parser


def _shown(allowed: Sequence[str]) -> str:
    """A flag's values in the usage line."""
    return "STAGE" if tuple(allowed) == STAGES else "{" + ",".join(allowed) + "}"


def _tidy(parser: Any, keys: Mapping[str, Any]) -> None:
    """Show types as placeholders, and hide jsonargparse's flags that no one needs."""
    from argparse import SUPPRESS

    for action in parser._actions:
        if action.dest in keys and not _is_group(keys[action.dest]):
            action.metavar = placeholder(keys[action.dest])
        elif action.dest == "print_config":
            action.help = "print all settings as YAML and exit"
        elif action.dest in keys or ".help" in "".join(action.option_strings):
            action.help = SUPPRESS


def _is_group(hint: Any) -> bool:
    """Whether the fields of this type are listed as flags of their own."""
    return isinstance(hint, type) and is_dataclass(hint)


def placeholder(hint: Any) -> str:
    """How the help shows a value of this type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(placeholder(part) for part in parts if part is not type(None))
    if _is_group(hint):
        return "{" + ", ".join(f"{each.name}: .." for each in fields(hint)) + "}"
    if origin is dict:
        return "{key: value}"
    if origin is list:
        return "[a, b]"
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "{true,false}"}[hint]


def _message(error: BaseException, keys: Mapping[str, Any]) -> str:
    """What jsonargparse has to say, on one line and in the user's words."""
    text = " ".join(str(error).split())
    value = re.search(r'^Parser key "([^"]+)".* (?:Given|Got) value: ?(.*)$', text)
    if value and value[1] in keys:
        return f"{value[1]} is {value[2]!r}, but it must be {placeholder(keys[value[1]])}"
    return text
