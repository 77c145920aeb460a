"""The benchmark of steps on a GPU, at its smallest on a CPU: every row is whole, and bad words are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_steps

SMALLEST = ["--device", "cpu", "--batch", "2", "--intervals", "1", "2", "--cycles", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_optimizer_has_a_row_of_times_shares_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_steps.main([*SMALLEST, "--networks", "resnet8", "wrn10_1", "--precision", "bf16", "--results", str(tmp_path)])
    report = json.loads((tmp_path / "gpu_steps.json").read_text())
    assert report["device"] == "cpu" and report["torch"] and report["device_name"] and report["precision"] == "bf16"
    rows = report["rows"]
    expected = [(net, name) for net in ("resnet8", "wrn10_1") for name in ("sgd", "kfac", "ekfac", "gkfac")]
    assert [(row["network"], row["optimizer"]) for row in rows] == expected
    for row in rows:
        phases = sum(row[f"{name}_milliseconds"] for name in gpu_steps.PHASES)
        assert 0.8 * row["milliseconds"] < phases <= 1.01 * row["milliseconds"]
        assert sum(row[f"{name}_share"] for name in gpu_steps.PHASES) == pytest.approx(1)
        assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
        kronecker = row["optimizer"] != "sgd"
        assert (row["statistics_share"] > 0) == (row["inverses_share"] > 0) == kronecker
        assert row["ratio_to_sgd"] == 1 if not kronecker else row["ratio_to_sgd"] > 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows) and printed[-1].split()[:2] == ["wrn10_1", "gkfac"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--networks", "resnet21"], "error: networks: 'resnet21' is not known; expected such as resnet20"),
        (["--precision", "fp16"], "error: precision: 'fp16' is not allowed on a CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_steps.main([*SMALLEST, *words, "--results", str(tmp_path / "new")])
    assert str(end.value.code).startswith(line)
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_that_of_one_optimizer(tmp_path: Path) -> None:
    words = [
        "--device",
        "cuda",
        "--networks",
        "resnet8",
        "--batch",
        "32",
        "--intervals",
        "1",
        "2",
        "--cycles",
        "1",
        "--precision",
        "tf32",
    ]
    gpu_steps.main([*words, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu_steps.json").read_text())["rows"]
    memory = {row["optimizer"]: row["peak_memory_mib"] for row in rows}
    assert min(memory.values()) > 1 and max(memory.values()) < 10 * memory["sgd"]  # of a few convolutions' workspace
