"""Refuses bad values while DVC composes the configuration, before anything is queued, trained or written.

Hydra imports this module because `hydra.plugins_path` in .dvc/config names the folder above. It registers the
resolver behind the line `checked: ${checked:}` of conf/config.yaml, which hands the whole composed
configuration to the validation that every stage runs as well. A misspelt name in an override never gets that
far: for it, Hydra's own refusal is given the nearest and the valid names. All refusals are DVC's errors too, which
makes it print one line and no advice to ask for support.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError

CHECKOUT = Path(__file__).resolve().parents[2]


class NameRefused(DvcException, ConfigCompositionException):
    """An override that names what does not exist; `str` is one line."""


class ValueRefused(DvcException, InterpolationResolutionError):
    """A composed configuration that no stage would accept; `str` is one line."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.msg = line
        self._initialized = True  # as it is: OmegaConf would add lines on the place of the interpolation


@contextmanager
def importing_from_checkout() -> Iterator[None]:
    """The dvc command does not have the checkout on its path."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        yield
    finally:
        sys.path.remove(str(CHECKOUT))


def check(*, _root_: DictConfig) -> bool:
    """True when every stage would accept the configuration; ValueRefused otherwise."""
    keys = [str(key) for key in _root_ if key != "checked"]
    values = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys), resolve=True)
    with importing_from_checkout():
        from pipeline.checks import ConfigError
        from pipeline.validation import validate

        try:
            validate(values)
        except ConfigError as error:
            raise ValueRefused(str(error)) from None
    return True


def explain_key(refused: ConfigCompositionException, config: DictConfig) -> ConfigCompositionException:
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
    return NameRefused(f"{line} (+{cause.full_key}=... adds a name)")


def explain_choice(refused: ConfigCompositionException) -> NameRefused:
    """The refusal of a choice that is no file of its group, or of a group that does not exist, in one line."""
    if not isinstance(refused, MissingConfigException) or "/" not in (refused.missing_cfg_file or ""):
        return NameRefused(" ".join(str(refused).split()))
    group, _, name = str(refused.missing_cfg_file).rpartition("/")
    with importing_from_checkout():
        from pipeline.checks import unknown
        from pipeline.validation import available

        return NameRefused(str(unknown(group, name, available(group), group)))


def with_names_explained(apply: Any) -> Any:
    @functools.wraps(apply)
    def apply_overrides(overrides: Any, config: DictConfig) -> None:
        try:
            apply(overrides, config)
        except ConfigCompositionException as error:
            better = explain_key(error, config)
            raise better from (None if better is not error else error.__cause__)

    return apply_overrides


def with_choices_explained(load: Any) -> Any:
    @functools.wraps(load)
    def load_configuration(*words: Any, **named: Any) -> DictConfig:
        try:
            return load(*words, **named)
        except NameRefused:
            raise
        except ConfigCompositionException as error:
            if isinstance(error.__cause__, ValueRefused) or not str(error):
                raise
            raise explain_choice(error) from None

    return load_configuration


OmegaConf.register_new_resolver("checked", check, replace=True)
with suppress(ImportError, AttributeError):  # private to Hydra; without it, the refusals are Hydra's own
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    method = "_apply_overrides_to_config"
    setattr(ConfigLoaderImpl, method, staticmethod(with_names_explained(getattr(ConfigLoaderImpl, method))))
    method = "load_configuration"
    setattr(ConfigLoaderImpl, method, with_choices_explained(getattr(ConfigLoaderImpl, method)))
