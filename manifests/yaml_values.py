"""YAML as people read it: the core schema of YAML 1.2, without the conversions of YAML 1.1.

`010` and `1:30` are texts, not 8 and 90; `1e-4` is a number; `no` is a text. A key that is given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import UsageError

TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, which refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's name and form

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice, in lines {seen[key]} and {line}")
            seen[str(key)] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?(0|[1-9][0-9]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(TAG + _tag, re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of a YAML document.

    Raises:
        UsageError: it is not valid YAML, or a key is given twice. The message begins with `where`.
    """
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: expected valid YAML: {error}") from error


def parse_value(text: str, where: str) -> Any:
    """Return a value of the command line: a list, a mapping or a quoted text in YAML, or the text as written.

    Raises:
        UsageError: it begins like a list, a mapping or a quoted text, but is none. The message begins with `where`.
    """
    plain = text.strip()
    if plain[:1] not in ("[", "{", '"', "'"):
        loader: Any = _Loader("")  # its methods are not typed
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, plain, (True, False)), plain))
    try:
        node = yaml.compose(plain, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: the value is not YAML: {error}") from error
    if node is not None and (rest := plain[node.end_mark.index :].strip()):
        raise UsageError(f"{where}: expected one value, found {rest!r} after it.")
    return parse_yaml(plain, where)
