"""Refuses bad values while DVC composes the configuration, before anything is queued, trained or written.

Hydra imports this module because `hydra.plugins_path` in .dvc/config names the folder above. It registers the
resolver behind the line `checked: ${checked:}` of conf/config.yaml, which hands the whole composed
configuration to the validation that every stage runs as well. A misspelt key of an override never gets that
far: for it, Hydra's own refusal is given the nearest and the valid names.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

CHECKOUT = Path(__file__).resolve().parents[2]


@contextmanager
def importing_from_checkout() -> Iterator[None]:
    """The dvc command does not have the checkout on its path."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        yield
    finally:
        sys.path.remove(str(CHECKOUT))


def check(*, _root_: DictConfig) -> bool:
    """True when every stage would accept the configuration; ConfigError otherwise."""
    keys = [str(key) for key in _root_ if key != "checked"]
    values = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys), resolve=True)
    with importing_from_checkout():
        from pipeline.validation import validate

        validate(values)
    return True


def explain(refused: ConfigCompositionException, config: DictConfig) -> ConfigCompositionException:
    """The refusal of an override whose key does not exist, with the names that stand at its place."""
    cause = refused.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not cause.full_key:
        return refused
    parent, _, name = str(cause.full_key).rpartition(".")
    place = OmegaConf.select(config, parent) if parent else config
    if not isinstance(place, DictConfig):
        return refused
    with importing_from_checkout():
        from pipeline.checks import unknown

        names = [str(key) for key in place if key not in ("hydra", "checked")]
        line = unknown(str(cause.full_key), name, names)
    return ConfigCompositionException(f"{line} (+{cause.full_key}=... adds a name)")


def explained(apply: Any) -> Any:
    @functools.wraps(apply)
    def apply_overrides(overrides: Any, config: DictConfig) -> None:
        try:
            apply(overrides, config)
        except ConfigCompositionException as error:
            better = explain(error, config)
            raise better from (None if better is not error else error.__cause__)

    return apply_overrides


OmegaConf.register_new_resolver("checked", check, replace=True)
with suppress(ImportError, AttributeError):  # private to Hydra; without it, the refusal is Hydra's own
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    method = "_apply_overrides_to_config"
    setattr(ConfigLoaderImpl, method, staticmethod(explained(getattr(ConfigLoaderImpl, method))))
