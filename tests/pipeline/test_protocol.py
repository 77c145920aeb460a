"""Claims about the rule book: its version is the code's, every run knows it, and two versions are never compared."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_records as synthetic

from pipeline import aggregate, comparability
from pipeline.config import PROTOCOL, ConfigError
from pipeline.metrics import configuration_hash, parameters
from pipeline.records import read_run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_the_documents_version_is_the_codes() -> None:
    assert re.findall(r"^# .*, version (\S+)$", TEXT, re.MULTILINE) == [PROTOCOL]


def test_every_question_has_its_section() -> None:
    sections = {
        re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", TEXT, re.M)
    }
    linked = re.findall(r"\]\(#([\w-]+)\)", TEXT)
    assert linked and set(linked) <= sections


def test_the_key_that_the_document_names_is_the_codes() -> None:
    named = re.search(r"\*comparability key\*:(.*?)\. The key", TEXT, re.DOTALL)
    assert named is not None
    assert re.findall(r"`(\w+)`", named.group(1)) == list(comparability.FROM_CONFIG)


def test_a_record_says_which_version_it_was_made_by_and_so_does_its_run_in_mlflow(tmp_path: Path) -> None:
    chosen = synthetic.params(("toy_mlp",), ("sgd",), (0,))
    run = read_run(synthetic.write_record(tmp_path, chosen, "toy_mlp", "sgd", 0))
    assert run.config["protocol"] == PROTOCOL == parameters(run.config)["protocol"]
    assert f"protocol: {PROTOCOL}" in comparability.text(comparability.key(run.config, run.environment))
    assert configuration_hash(run.config) != configuration_hash({**run.config, "protocol": "0"})


def test_runs_of_two_versions_are_not_compared(tmp_path: Path) -> None:
    chosen = synthetic.params(("toy_mlp",), ("sgd", "kfac"), (0, 1))
    synthetic.write_study(tmp_path, chosen)
    study = aggregate.collect(chosen, tmp_path)["toy_mlp"]
    older = [replace(run, config={**run.config, "protocol": "2"}) for run in study["sgd"]]
    with pytest.raises(ConfigError, match=rf"protocol is '2' \(sgd\) and '{PROTOCOL}' \(kfac\)"):
        comparability.check("toy_mlp", {**study, "sgd": older})
    config = study["sgd"][0].folder / "config.yaml"
    config.write_text(config.read_text().replace(f"protocol: '{PROTOCOL}'", "protocol: '2'"))
    with pytest.raises(ConfigError, match=rf"trained with protocol '2', now it is '{PROTOCOL}'"):
        aggregate.collect(chosen, tmp_path)
