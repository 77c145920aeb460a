"""Composes pipeline/conf into params.yaml the way `dvc exp run` does: `python -m pipeline.composition`.

For those who edit pipeline/conf and want params.yaml in step without training anything.
"""

import sys
from pathlib import Path

from pipeline.checks import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def compose(output: Path, overrides: list[str] | None = None) -> None:
    """Write the composition under Hydra overrides, such as `optimizer=ekfac`, to the file `output`.

    Raises ConfigError for an override, or a file of pipeline/conf, that cannot be; nothing is written then.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    conf, plugins = ROOT / "pipeline" / "conf", ROOT / "pipeline"
    try:
        compose_and_dump(output, str(conf), None, "config", str(plugins), overrides or [])
    except (DvcException, HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    try:
        compose(ROOT / "params.yaml", sys.argv[1:])
    except ConfigError as refused:
        sys.stderr.write(f"error: {refused}\n")
        sys.exit(2)
