"""Puts one benchmark's value into a yaml of pipeline/conf: the settings that a tuning chose, a range that it widened.

The one idea: a value becomes, or joins, a mapping by benchmark; comments, order and all other values stay.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.validation import SCHEDULE_KEYS, maps_benchmarks

_WIDTH = 116  # a mapping that does not fit on a line of so many characters has a line an entry


def write(file: Path, benchmark: str, fields: Mapping[tuple[str, ...], tuple[Any, Any]]) -> bool:
    """Set fields of a yaml, each a path of keys, for a benchmark; whether anything changed.

    A field comes with its value and with what the other benchmarks have where the file does not say.
    """
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    before = file.read_text(encoding="utf-8")
    content = yaml.load(before)
    for path, (value, default) in fields.items():
        _set(content, path, _as_yaml(value), _as_yaml(default), benchmark)
    _break_lines(content)
    written = io.StringIO()
    yaml.dump(content, written)
    after = written.getvalue()
    if after != before:
        file.write_text(after, encoding="utf-8")
    return after != before


def _set(content: Any, path: tuple[str, ...], value: Any, default: Any, benchmark: str) -> None:
    *outer, name = path
    for key in outer:
        content = content.setdefault(key, CommentedMap())
    old = content.get(name, default)
    if not maps_benchmarks(old):
        mapping = CommentedMap(default=old)
        mapping.fa.set_flow_style()
        content[name] = old = mapping
    old[benchmark] = value


def _as_yaml(value: Any) -> Any:
    if isinstance(value, list | tuple):
        sequence = CommentedSeq(map(_as_yaml, value))
        sequence.fa.set_flow_style()
        return sequence
    return value


def _break_lines(content: Any, indent: int = 0) -> None:
    """Mappings by benchmark that are too long for a line get a line an entry."""
    for name, value in content.items():
        if isinstance(value, CommentedMap):
            if (
                value.fa.flow_style()
                and len(f"{name}: {dict(value)}") + indent > _WIDTH
                and value.keys() != SCHEDULE_KEYS
            ):
                value.fa.set_block_style()
            _break_lines(value, indent + 2)
