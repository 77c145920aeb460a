"""Composes pipeline/conf into params.yaml the way `dvc exp run` does: `python -m pipeline.composition`.

For those who edit pipeline/conf and want params.yaml in step without training anything.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compose(output: Path, overrides: list[str] | None = None) -> None:
    """Write the composition under Hydra overrides, such as `optimizer=ekfac`, to the file `output`."""
    from dvc.utils.hydra import compose_and_dump

    compose_and_dump(output, str(ROOT / "pipeline" / "conf"), None, "config", str(ROOT / "pipeline"), overrides or [])


if __name__ == "__main__":
    compose(ROOT / "params.yaml", sys.argv[1:])
