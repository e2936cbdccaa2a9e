"""Dashboards and rules ask for metrics that there are, in ways that their kinds allow, and leave none out.

What the rules do with them is tried by promtool (`infra/monitoring/rules_test.yaml`).
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser as promql
import pytest
import yaml

from fermata.v1 import errors_pb2
from services.common import metric_names
from services.common.metrics import Kind, Name
from services.common.prometheus import family_name
from services.common.timings import Parts
from services.common.types import FinishReason

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "infra" / "monitoring"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").glob("*.json"))}
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}

NAMES = {key: value for key, value in vars(metric_names).items() if isinstance(value, Name)}
HISTOGRAMS = {
    *("REQUEST_DURATION", "TIME_TO_FIRST_TOKEN", "TIME_PER_OUTPUT_TOKEN", "TOKEN_LATENCY", "TOKEN_PART"),
    *("FIRST_TOKEN_PART", "COMMIT_LAG", "STEP_DURATION", "STEP_SEQUENCES", "STEP_TOKENS"),
}
GAUGES = {
    *("STREAMS", "GENERATIONS", "STORE_CUT_OFF", "RUNNING", "WAITING", "KV_BLOCKS", "KV_USAGE", "PROCESS_MEMORY"),
}
OWN_LABELS = {
    "TOKEN_PART": "part",
    "FIRST_TOKEN_PART": "part",
    "FINISHED": "finish_reason",
    "FAILED_CALLS": "error_type",
}
TARGET_LABELS = {"job", "service", "instance"}
"""What Prometheus says of where a sample comes from."""
VALUES = {
    "part": set(Parts._fields),
    "finish_reason": {reason.name for reason in FinishReason},
    "error_type": {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name},
    "service": {"tokenizer", "orchestrator", "shard"},
    "job": {"fermata"},
}


class Series(NamedTuple):
    """What a query may ask for.

    Attributes:
        metric: its name in `metric_names.py`; empty for what is not ours.
        grows: it only makes sense as a rate.
        labels: that it has.
    """

    metric: str
    grows: bool
    labels: frozenset[str]


def kind_of(metric: str) -> Kind:
    if metric in HISTOGRAMS:
        return Kind.HISTOGRAM
    return Kind.GAUGE if metric in GAUGES else Kind.COUNTER


def known_series() -> dict[str, Series]:
    """All series that there are, by the names that Prometheus has for them."""
    known = {"up": Series("", False, frozenset(TARGET_LABELS))}
    known |= {name: Series("", False, frozenset({"part", *TARGET_LABELS})) for name in RECORDED}
    for metric, name in NAMES.items():
        labels = frozenset({OWN_LABELS[metric]} if metric in OWN_LABELS else ()) | TARGET_LABELS
        plain = family_name(name)
        match kind_of(metric):
            case Kind.HISTOGRAM:
                known[f"{plain}_bucket"] = Series(metric, True, labels | {"le"})
                known[f"{plain}_sum"] = known[f"{plain}_count"] = Series(metric, True, labels)
            case Kind.COUNTER:
                known[f"{plain}_total"] = Series(metric, True, labels)
            case Kind.GAUGE:
                known[plain] = Series(metric, False, labels)
    return known


KNOWN = known_series()


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: dict[str, Any]) -> list[str]:
    """All queries of a dashboard, those of its variables too, as Prometheus gets them."""
    found = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match is not None
            assert match[2] == variable["name"]
            found.append(match[1])
    return [query.replace("$__rate_interval", "1m") for query in found]


QUERIES = [query for dashboard in DASHBOARDS.values() for query in queries_of(dashboard)]
EXPRESSIONS = [*QUERIES, *(rule["expr"] for rule in RULES)]


def nodes(expression: str) -> list[promql.Expr]:
    """All nodes of a query, each before what it consists of."""
    found: list[promql.Expr] = []
    promql.walk(promql.parse(expression), found.append)
    return found


def selectors(expression: str) -> Iterator[tuple[promql.VectorSelector, bool]]:
    """The selectors of a query, and whether each is of a range."""
    in_range = False
    for node in nodes(expression):
        if isinstance(node, promql.VectorSelector):
            yield node, in_range
        in_range = isinstance(node, promql.MatrixSelector)  # the walk goes on to its selector


def series_in(expression: str) -> list[Series]:
    return [KNOWN[selector.name or ""] for selector, _ in selectors(expression)]


def test_it_looks_at_something() -> None:
    assert set(DASHBOARDS) == {"fermata-tokens", "fermata-replicas"}
    assert len(QUERIES) > 60
    assert len(ALERTS) == 12
    assert HISTOGRAMS | GAUGES | OWN_LABELS.keys() <= NAMES.keys()


def test_the_kinds_are_those_that_the_services_count() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                if node.func.attr in set(Kind) and isinstance(first, ast.Attribute) and first.attr in NAMES:
                    found.setdefault(first.attr, set()).add(node.func.attr)
    assert {"TOLD_TOKENS", "STREAMS", "TIME_TO_FIRST_TOKEN"} <= found.keys()
    assert found == {metric: {kind_of(metric)} for metric in found}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_for_what_there_is(expression: str) -> None:
    asked = list(selectors(expression))
    assert asked
    for selector, in_range in asked:
        series = KNOWN[selector.name or ""]
        assert in_range == series.grows, "what grows is seen through a rate alone"
        assert not selector.matchers.or_matchers
        for matcher in selector.matchers.matchers:
            assert matcher.name in series.labels
            values = set(matcher.value.split("|"))
            assert matcher.value == f"${matcher.name}" or values <= VALUES[matcher.name]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_groups_by_labels_that_there_are(expression: str) -> None:
    known = {label for series in series_in(expression) for label in series.labels}
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= known
        if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            assert set(node.modifier.matching.labels) <= known
        if isinstance(node, promql.MatrixSelector):
            assert node.range.total_seconds() >= 60
        if isinstance(node, promql.Call) and node.func.name == "histogram_quantile":
            assert all("le" in series.labels for series in series_in(str(node.args[1].prettify())))
            assert "le" in node.args[1].modifier.labels


def test_every_metric_is_shown() -> None:
    shown = {series.metric for query in QUERIES for series in series_in(query)}
    assert NAMES.keys() - shown == set()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_legends_name_labels_that_are_left(name: str) -> None:
    for panel in panels(DASHBOARDS[name]):
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m")
            grouped = [
                set(node.modifier.labels)
                for node in nodes(query)
                if isinstance(node, promql.AggregateExpr) and node.modifier is not None
            ]
            left = set.union(*grouped) if grouped else set.union(*(set(series.labels) for series in series_in(query)))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_provisioned(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == name
    assert "id" not in dashboard
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "service", "instance"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(dashboard):
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert panel["title"] and panel["description"].endswith(".")
        assert "unit" in panel["fieldConfig"]["defaults"] or panel["type"] == "heatmap"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_names_and_places_of_their_own(name: str) -> None:
    everything = DASHBOARDS[name]["panels"]
    for field in ("id", "title"):
        assert max(Counter(panel[field] for panel in everything).values()) == 1
    taken: Counter[tuple[int, int]] = Counter()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)
    assert max(taken.values()) == 1


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= TARGET_LABELS
    assert "`fermata" in text or "dashboard" in text


@pytest.mark.parametrize("alert", ALERTS)
def test_what_an_alert_points_to_is_there(alert: str) -> None:
    description = ALERTS[alert]["annotations"]["description"]
    titles = {dashboard["title"]: {panel["title"] for panel in panels(dashboard)} for dashboard in DASHBOARDS.values()}
    quoted = set(re.findall(r'"([^"]+)"', description))
    pointed = quoted & titles.keys()
    assert len(pointed) == bool(quoted)
    assert quoted - pointed <= {panel for title in pointed for panel in titles[title]}
    assert set(re.findall(r"Fermata[A-Z]\w+", description)) <= ALERTS.keys()


def test_every_alert_is_tried() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    for test in tests:
        for case in test.get("promql_expr_test", ()):
            for sample in case["exp_samples"]:
                fired |= set(re.findall(r'alertname="(\w+)"', sample["labels"]))
    assert fired == ALERTS.keys()


def test_prometheus_reads_the_rules_and_the_targets_of_the_default_state_directory() -> None:
    settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [FOLDER / name for name in settings["rule_files"]] == [FOLDER / "rules.yaml"]
    (job,) = settings["scrape_configs"]
    assert job["job_name"] in VALUES["job"]
    ((targets,),) = [discovery["files"] for discovery in job["file_sd_configs"]]
    assert (FOLDER / targets).resolve() == ROOT / ".fermata" / "targets" / "*.json"
