"""The prefilled comparison of one experiment in the MLflow UI, as plain data.

The UI keeps a shared view in an experiment tag: JSON around a compressed description of chart cards, sections, columns
and grouping. The format is undocumented, so all that is known of it stands here, free of MLflow itself.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from pipeline.metrics import HISTORY, with_limits

VIEW_KEY = "comparison"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
GROUP_TAG = "group.label"  # a name under which the colours below differ, for the colour-blind too

_LINE, _BAR = "LINE", "BAR"
_OPEN = 2  # sections

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


def comparison(target_metric: str) -> str:
    """Value of VIEW_TAG for the runs of a benchmark. `target_metric` (train_loss, …) names the curve that is first."""
    main = HISTORY[target_metric]
    others = [name for name in ("loss/train", "loss/validation", "loss/excess") if name != main]
    sections = {
        "Race": [
            _line(main, log=True),
            _line(main, seconds=True, log=True),
            _bar("target/hard_steps"),
            _bar("target/hard_seconds"),
            _bar("target/hard_reached"),
            _bar("target/easy_steps"),
            _bar("target/easy_seconds"),
            _bar("target/easy_reached"),
            _bar("result/test_loss"),
        ],
        "Other losses and scores": [
            *(_line(name, log=True) for name in others),
            *(_line(name, seconds=True, log=True) for name in others),
            _line("score/train"),
            _line("score/validation"),
            _bar("result/test_score"),
        ],
        "Cost": [
            _bar("time/training_seconds"),
            _bar("time/forward_backward_seconds"),
            _bar("time/statistics_seconds"),
            _bar("time/inverses_seconds"),
            _bar("time/update_seconds"),
            _bar("time/peak_memory_mib"),
        ],
        "Step": [
            _line("optimizer/lr"),
            _line("optimizer/damping", log=True),
            _line("optimizer/mean_curvature", log=True),
            _line("optimizer/alpha", log=True),
            _line("optimizer/momentum"),
            _line("optimizer/kl_clip"),
            _line("curvature_reduction_ratio"),
            _line("curvature_cosine_gradient"),
            _line("curvature_cosine_natural"),
        ],
        "Curvature": [
            _line("curvature_top_eigenvalue", log=True),
            _line("curvature_trace", log=True),
            _line("curvature_gradient_norm", log=True),
            _line("curvature_update_norm", log=True),
            _line("curvature_condition_a", log=True),
            _line("curvature_condition_g", log=True),
            _line("curvature_factor_drift"),
            _line("curvature_coarse_gain", log=True),
        ],
    }
    group = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "tag", "groupByData": GROUP_TAG}],
    }
    return _tag(sections, ["tags.`status`", *_columns(target_metric)], group)


def means(target_metric: str) -> str:
    """Value of VIEW_TAG for the means of a benchmark: every curve with the limits of its interval, broken lines."""
    main = HISTORY[target_metric]
    others = [name for name in ("loss/train", "loss/validation", "loss/excess") if name != main]
    sections = {
        "Race": [
            _line(*with_limits(main), log=True),
            _line(*with_limits(main), seconds=True, log=True),
            *(
                _bar(f"target/{target}_{what}")
                for target in ("hard", "easy")
                for what in ("steps", "seconds", "reached")
            ),
            _bar("result/test_loss"),
        ],
        "Other losses and scores": [
            *(_line(*with_limits(name), seconds=seconds, log=True) for name in others for seconds in (False, True)),
            _line(*with_limits("score/train")),
            _line(*with_limits("score/validation")),
        ],
    }
    return _tag(sections, ["tags.`seeds`", *_columns(target_metric)], None)


def _columns(target_metric: str) -> list[str]:
    names = (
        *("target/hard_reached", "target/hard_steps", "target/hard_seconds", "target/easy_seconds"),
        *(f"result/{target_metric}", "result/validation_loss", "result/test_loss", "result/test_score"),
        "time/training_seconds",
    )
    return [f"metrics.`{name}`" for name in dict.fromkeys(names)]


def _tag(sections: dict[str, list[dict[str, Any]]], columns: list[str], group: dict[str, Any] | None) -> str:
    """The view as the UI keeps it; the first sections are open."""
    cards = []
    for section, drawn in sections.items():
        for index, card in enumerate(drawn):
            cards.append({**card, "uuid": f"{section}-{index}", "metricSectionId": section})
    state = {
        "compareRunCharts": cards,
        "compareRunSections": [
            *(_section(name, shown=index < _OPEN) for index, name in enumerate(sections)),
            # What the UI adds by itself for the metrics that have no card above.
            *(_section(name, shown=False) for name in ("optimizer", "result", "time")),
            _section("Model metrics", shown=False),
        ],
        "selectedColumns": columns,
        "orderByKey": "attributes.`Created`",
        "orderByAsc": True,
        "groupBy": group,
        "useGroupedValuesInCharts": True,
        "groupsExpanded": {},
        "runsHiddenMode": "SHOW_ALL",
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


def _line(*metrics: str, seconds: bool = False, log: bool = False) -> dict[str, Any]:
    """A chart of curves; the UI names it after its metrics."""
    return {
        "type": _LINE,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metrics[0],
        "selectedMetricKeys": list(metrics),
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


def _bar(metric: str) -> dict[str, Any]:
    return {
        "type": _BAR,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "runsCountToCompare": 100,
    }
