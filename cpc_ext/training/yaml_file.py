"""A reader for YAML files of options: of bounded size, without duplicate names and without aliases.

Aliases can expand a few lines to gigabytes, or make a list contain itself; none of our files has them.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

__all__ = ["YAMLError", "read_yaml"]

_MOST_BYTES = 1 << 20


def read_yaml(path: Path) -> Any:
    """Return a file's content as plain values in dictionaries and lists.

    Raises OSError if it cannot be read, and YAMLError, ValueError or RecursionError if it holds anything else.
    """
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return yaml.load(content.decode(), _Loader)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs have no annotation there.
            raise YAMLError(f"it refers to another place by *{event.anchor}, write the value{event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise YAMLError(f"it has {', '.join(twice)} twice{node.start_mark}")
        mapping = super().construct_mapping(node, deep)
        others = [key for key in mapping if not isinstance(key, str)]
        if others:
            raise YAMLError(f"it has {others[0]!r:.80} as a name{node.start_mark}")
        return mapping
