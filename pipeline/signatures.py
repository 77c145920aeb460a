"""Constructor arguments of a class named by a dotted path, read from its source without importing it.

Importing torch takes seconds, and a misspelt hyper-parameter should be refused at once. So the package's
folder is looked up, its files are parsed, re-exports are followed, and the names, defaults and bases are
taken from the syntax tree. What cannot be decided this way (compiled modules, names made at run time) is left
open, and the training stage decides with the real class.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checks import ConfigError, nearest

REQUIRED = object()
UNREADABLE = object()
EXTRAS = {"pytorch_optimizer": "peers"}  # package -> the extra of pyproject.toml that has it
CONNECTED = {"self", "params", "model", "loss", "generator"}  # what the training loop passes itself


@dataclass
class Signature:
    """`arguments` maps a name to its default: a plain value, REQUIRED, or UNREADABLE. `open`: other names may exist."""

    arguments: dict[str, Any] = field(default_factory=dict)
    open: bool = False


@functools.cache
def signature(target: str) -> Signature:
    """Arguments of the class `target`, without those that the training loop passes.

    Raises ConfigError when the package, the module or the class certainly does not exist.
    """
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{target!r} is not the dotted name of a class, such as torch.optim.SGD")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        extra = EXTRAS.get(parts[0])
        remedy = f"; `pip install '.[{extra}]'` brings it" if extra else ""
        raise ConfigError(f"{target!r} cannot be imported: no package {parts[0]!r} in this environment{remedy}")
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
    elif spec.origin and spec.origin.endswith(".py"):
        root = Path(spec.origin)
    else:
        return Signature(open=True)
    found = _find(root, parts[0], parts[:-1], parts[-1])
    if found is None:
        return Signature(open=True)
    result = _arguments(root, *found)
    for name in CONNECTED:
        result.arguments.pop(name, None)
    return result


@functools.cache
def _module(root: Path, parts: tuple[str, ...]) -> tuple[ast.Module, bool] | None:
    """Syntax tree of the module and whether it is a package; None when there is no such source file."""
    base = root.joinpath(*parts[1:]) if root.is_dir() else root
    for path, package in ((base / "__init__.py", True), (base.with_suffix(".py"), False)):
        if path.is_file():
            return ast.parse(path.read_bytes()), package
    return None


def _find(root: Path, top: str, parts: list[str], name: str) -> tuple[tuple[str, ...], ast.ClassDef] | None:
    """Where class `name` of module `parts` is defined, through re-exports; None when that cannot be told."""
    module, seen = tuple(parts), set()
    asked = ".".join([*parts, name])
    while (module, name) not in seen:
        seen.add((module, name))
        loaded = _module(root, module)
        if loaded is None:
            if root.joinpath(*module[1:]).is_dir() or list(root.joinpath(*module[1:-1]).glob(module[-1] + ".*so")):
                return None  # a namespace package or a compiled module
            raise ConfigError(f"{asked!r} cannot be imported: no module {'.'.join(module)!r}")
        tree, package = loaded
        names: set[str] = set()
        certain, following = True, None
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef():
                    names.add(node.name)
                    if node.name == name:
                        return module, node
                case ast.FunctionDef(name="__getattr__"):
                    certain = False
                case ast.ImportFrom():
                    origin = _origin(module, package, node)
                    for alias in node.names:
                        certain = certain and alias.name != "*"
                        names.add(alias.asname or alias.name)
                        if (alias.asname or alias.name) == name:
                            following = (origin, alias.name)
                case ast.Assign(targets=[ast.Name(id=assigned)]):
                    certain = certain and assigned != name
        if following is None:
            if not certain:
                return None
            public = [n for n in names if not n.startswith("_")]
            raise ConfigError(
                f"{asked!r} cannot be imported: {'.'.join(module)} has no {name!r}{nearest(name, public)}"
            )
        module, name = following
        if module[0] != top:
            return None
    return None


def _origin(module: tuple[str, ...], package: bool, node: ast.ImportFrom) -> tuple[str, ...]:
    """The module that `from … import` names, relative dots resolved."""
    named = tuple(node.module.split(".")) if node.module else ()
    if not node.level:
        return named
    drop = node.level - (1 if package else 0)
    return module[: len(module) - drop] + named


def _arguments(root: Path, module: tuple[str, ...], node: ast.ClassDef) -> Signature:
    """Arguments of the class's constructor; with ** or without a constructor of its own, its base's as well."""
    result = Signature()
    constructor = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if constructor is not None:
        a = constructor.args
        positional = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
        for argument, default in [
            *zip(positional, defaults, strict=True),
            *zip(a.kwonlyargs, a.kw_defaults, strict=True),
        ]:
            result.arguments[argument.arg] = REQUIRED if default is None else _constant(default)
        if a.kwarg is None:
            return result
    for base in node.bases:
        if not isinstance(base, ast.Name):
            result.open = True
            continue
        try:
            found = _find(root, module[0], list(module), base.id)
        except ConfigError:  # a builtin such as object
            continue
        if found is None:
            result.open = True
            continue
        inherited = _arguments(root, *found)
        if constructor is not None:  # it may pass on by itself what its base requires
            inherited.arguments = {k: UNREADABLE if v is REQUIRED else v for k, v in inherited.arguments.items()}
        result.arguments = {**inherited.arguments, **result.arguments}
        result.open = result.open or inherited.open
    return result


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNREADABLE
