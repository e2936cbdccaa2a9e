"""What Prometheus reads over HTTP, parsed by its own parser."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.common import metric_names
from services.common.metrics import Metrics, Name
from services.common.otlp import resource
from services.common.prometheus import Endpoint, Exposition, family_name

PROCESS = resource("shard", instance_id="c0ffee", node="here")


@contextmanager
def served(metrics: Metrics, port: int = 0) -> Iterator[int]:
    endpoint = Endpoint(Exposition(metrics, PROCESS), "127.0.0.1", port)
    try:
        yield endpoint.port
    finally:
        endpoint.close()


def scrape(port: int) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def values(family: Metric) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in family.samples}


def test_all_kinds_can_be_read() -> None:
    metrics = Metrics()
    recorded = metrics.histogram(Name("fermata.token.part", "s", "A part."), (0.001, 2.5), part="wait")
    for value in (0.0005, 0.002, 0.002, 3):
        recorded.record(value)
    metrics.counter(Name("fermata.calls.failed", "{call}", "Failed."), lambda: 3, error_type="gone")
    metrics.counter(Name("fermata.calls.failed", "{call}", "Failed."), lambda: 4)
    metrics.gauge(Name("process.memory.usage", "By", "Resident."), lambda: 1 << 20)
    with served(metrics) as port:
        families = scrape(port)
    part = families["fermata_token_part_seconds"]
    assert (part.type, part.documentation) == ("histogram", "A part.")
    wait = ("part", "wait")
    assert values(part) == {
        ("fermata_token_part_seconds_bucket", (("le", "0.001"), wait)): 1,
        ("fermata_token_part_seconds_bucket", (("le", "2.5"), wait)): 3,
        ("fermata_token_part_seconds_bucket", (("le", "+Inf"), wait)): 4,
        ("fermata_token_part_seconds_count", (wait,)): 4,
        ("fermata_token_part_seconds_sum", (wait,)): 3.0045,
    }
    assert values(families["fermata_calls_failed"]) == {
        ("fermata_calls_failed_total", (("error_type", "gone"),)): 3,
        ("fermata_calls_failed_total", (("error_type", ""),)): 4,
    }
    assert values(families["process_memory_usage_bytes"]) == {("process_memory_usage_bytes", ()): 1 << 20}
    [(_, labels)] = values(families["target_info"])
    assert dict(labels)["service_name"] == "fermata-shard"


def test_names_are_as_the_list_says() -> None:
    assert family_name(metric_names.TIME_TO_FIRST_TOKEN) == "gen_ai_server_time_to_first_token_seconds"
    assert family_name(metric_names.KV_USAGE) == "fermata_kv_usage_ratio"
    assert family_name(metric_names.WAITING) == "fermata_sequences_waiting"
    assert family_name(Name("queue.seconds", "s", "Has its unit in its name.")) == "queue_seconds"


def test_figures_are_read_when_somebody_asks() -> None:
    metrics = Metrics()
    now = [1.0]
    metrics.gauge(Name("level", "{thing}", "Now."), lambda: now[0])
    with served(metrics) as port:
        before = scrape(port)
        now[0] = 2.0
        after = scrape(port)
    assert [values(families["level"])["level", ()] for families in (before, after)] == [1, 2]


def test_a_port_that_is_taken_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with caplog.at_level(logging.WARNING), served(Metrics(), taken) as port:
            assert port not in {0, taken}
            assert "target_info" in scrape(port)
    assert f"port {taken} is taken" in caplog.text


def test_a_closed_endpoint_gives_its_port_back() -> None:
    with served(Metrics()) as port:
        pass
    with served(Metrics(), port) as again:
        assert again == port
