"""The prefilled comparison of one experiment in the MLflow UI, as plain data.

The UI keeps a shared view in an experiment tag: JSON around a compressed description of chart cards, sections, columns
and grouping. The format is undocumented, so all that is known of it stands here, free of MLflow itself.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from pipeline.metrics import HISTORY

VIEW_KEY = "comparison"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
GROUP_TAG = "optimizer.compared"  # a name under which the colours below differ for the colour-blind, too

_LINE, _BAR = "LINE", "BAR"

# The UI's own colours; a group of runs gets one by a checksum of its name, and nothing but the name can change it.
_PALETTE = (
    "#a6630c", "#c83243", "#b45091", "#8a63bf", "#434a93", "#137dae", "#04867d", "#308613", "#facb66", "#1f272d",
    "#445461", "#5f7281", "#8396a5", "#93320b", "#be501e", "#de7921", "#f2be88", "#115026", "#277c43", "#3ba65e",
    "#8ddda8", "#9e102c", "#c82d4c", "#e65b77", "#f792a6", "#0e538b", "#2272b4", "#4299e0", "#8acaff",
)  # fmt: skip


def colour(setting: str) -> str:
    """The colour that the UI gives to the group `setting`, so that single runs can wear their group's."""
    low = high = 0
    for character in f"tag.{GROUP_TAG}.{setting}":
        low = (low + ord(character)) % 255
        high = (high + low) % 255
    return _PALETTE[(low | high << 8) % len(_PALETTE)]


def link_query() -> str:
    """What follows `#/experiments/<id>/runs` in the address of the prefilled view."""
    return f"?workflowType=machine_learning&viewStateShareKey={VIEW_KEY}&compareRunsMode=CHART"


def note(benchmark: str) -> str:
    """What stands above the runs of an experiment, and in the list of experiments."""
    return f"{benchmark}: one run a seed; the time axis is training time. Open the comparison under Views."


def comparison(target_metric: str) -> str:
    """Value of the experiment tag VIEW_TAG. `target_metric` (train_loss, …) names the curve that opens the page."""
    main = HISTORY[target_metric]
    others = [name for name in ("loss/train", "loss/validation", "loss/excess") if name != main]
    sections = {
        "Race": [
            _line(main, f"{main} against steps", log=True),
            _line(main, f"{main} against training seconds", seconds=True, log=True),
            _bar("target/hard_steps", "Steps to the hard target"),
            _bar("target/hard_seconds", "Training seconds to the hard target"),
            _bar("target/hard_reached", "Share of seeds that reached the hard target"),
            _bar("target/easy_steps", "Steps to the easy target"),
            _bar("target/easy_seconds", "Training seconds to the easy target"),
            _bar("target/easy_reached", "Share of seeds that reached the easy target"),
            _bar("result/test_loss", "Test loss at the end"),
        ],
        "Other losses and scores": [
            *(_line(name, f"{name} against steps", log=True) for name in others),
            *(_line(name, f"{name} against training seconds", seconds=True, log=True) for name in others),
            _line("score/train", "score/train against steps"),
            _line("score/validation", "score/validation against steps"),
            _bar("result/test_score", "Test score at the end"),
        ],
        "Cost": [
            _bar("time/training_seconds", "Training seconds, whole run"),
            _bar("time/forward_backward_seconds", "… in forward and backward"),
            _bar("time/statistics_seconds", "… in curvature statistics"),
            _bar("time/inverses_seconds", "… in inverses"),
            _bar("time/update_seconds", "… in preconditioning and update"),
            _bar("time/peak_memory_mib", "Peak memory, MiB"),
        ],
        "Step": [
            _line("optimizer/lr", "Learning rate"),
            _line("optimizer/damping", "Damping", log=True),
            _line("optimizer/mean_curvature", "Mean curvature", log=True),
            _line("optimizer/alpha", "Step size of the quadratic model", log=True),
            _line("optimizer/momentum", "Momentum of the quadratic model"),
            _line("optimizer/kl_clip", "KL-clip factor"),
            _line("curvature_reduction_ratio", "Reduction ratio, actual over predicted"),
            _line("curvature_cosine_gradient", "Cosine of the update with the gradient"),
            _line("curvature_cosine_natural", "Cosine of the update with the natural gradient"),
        ],
        "Curvature": [
            _line("curvature_top_eigenvalue", "Largest eigenvalue of the Gauss-Newton matrix", log=True),
            _line("curvature_trace", "Trace of the Gauss-Newton matrix", log=True),
            _line("curvature_gradient_norm", "Gradient norm", log=True),
            _line("curvature_update_norm", "Update norm", log=True),
            _line("curvature_condition_a", "Condition number of A, median over layers", log=True),
            _line("curvature_condition_g", "Condition number of G, median over layers", log=True),
            _line("curvature_factor_drift", "Drift of the factors"),
            _line("curvature_coarse_gain", "Gain of the coarse step", log=True),
        ],
    }
    cards = []
    for section, drawn in sections.items():
        for index, card in enumerate(drawn):
            cards.append({**card, "uuid": f"{section}-{index}", "metricSectionId": section})
    state = {
        "compareRunCharts": cards,
        "compareRunSections": [
            *(_section(name, shown=index < 2) for index, name in enumerate(sections)),
            # What the UI adds by itself for the metrics that have no card above.
            *(_section(name, shown=False) for name in ("optimizer", "result", "time")),
            _section("Model metrics", shown=False),
        ],
        "selectedColumns": [
            "tags.`status`",
            *(
                f"metrics.`{name}`"
                for name in (
                    "target/hard_reached",
                    "target/hard_steps",
                    "target/hard_seconds",
                    "target/easy_seconds",
                    f"result/{target_metric}",
                    "result/validation_loss",
                    "result/test_loss",
                    "result/test_score",
                    "time/training_seconds",
                )
            ),
        ],
        "orderByKey": "attributes.`Created`",
        "orderByAsc": True,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": GROUP_TAG}],
        },
        "useGroupedValuesInCharts": True,
        "groupsExpanded": {},
        "runsHiddenMode": "SHOWALL",
        "runsPinned": [],
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state, sort_keys=True).encode(), 9)).decode()
    # A constant date keeps the tag equal from one writing to the next.
    return json.dumps({"name": "comparison", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def read(tag: str) -> dict[str, Any]:
    """The state inside a value of VIEW_TAG: what the UI unpacks."""
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def _section(name: str, *, shown: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": shown,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _line(metric: str, title: str, *, seconds: bool = False, log: bool = False) -> dict[str, Any]:
    return {
        "type": _LINE,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "displayName": title,
        "xAxisKey": "time-relative" if seconds else "step",
        "selectedXAxisMetricKey": "",
        "useGlobalXaxisKey": False,
        "xAxisScaleType": "linear",
        "scaleType": "log" if log else "linear",
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
        "displayPoints": False,
        "runsCountToCompare": 100,
        "selectedYAxisMetricKey": "metric",
        "yAxisKey": "metric",
        "range": {},
    }


def _bar(metric: str, title: str) -> dict[str, Any]:
    return {
        "type": _BAR,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "displayName": title,
        "runsCountToCompare": 100,
    }
