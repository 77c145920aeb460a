"""Refuses bad values while DVC composes the configuration, before anything is queued, trained or written.

Hydra imports this module because `hydra.plugins_path` in .dvc/config names the folder above. It registers the
resolver behind the line `checked: ${checked:}` of conf/config.yaml, which hands the whole composed configuration to
the validation which every stage runs as well.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CHECKOUT = Path(__file__).resolve().parents[2]


def check(*, _root_: DictConfig) -> bool:
    """True when `pipeline.config` accepts the configuration; its ConfigError otherwise."""
    values = OmegaConf.to_container(
        OmegaConf.masked_copy(_root_, [k for k in _root_ if k != "checked"]), resolve=True
    )
    sys.path.insert(0, str(CHECKOUT))  # the dvc command does not have the checkout on its path
    try:
        from pipeline.validation import validate

        validate(values)
    finally:
        sys.path.remove(str(CHECKOUT))
    return True


OmegaConf.register_new_resolver("checked", check, replace=True)
