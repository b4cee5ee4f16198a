"""YAML as plain data, with nothing said twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nybble.errors import ConfigError

__all__ = ["parse"]


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            message = f"the key {key.value!r} stands there twice"
            raise yaml.YAMLError(message)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, where: str) -> Mapping[str, Any]:
    """Return the mapping that a text is, empty for an empty one; `where` stands in messages.

    Raises
    ------
    ConfigError
        When it is no mapping in YAML, or has a key twice.
    """
    try:
        # A SafeLoader underneath: it makes numbers, texts, lists and mappings only.
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        message = f"{where}: expected YAML: {error}"
        raise ConfigError(message) from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        message = f"{where}: expected a mapping, found {type(value).__name__}"
        raise ConfigError(message)
    return value
