"""The figures of a process for Prometheus: the text that it reads, and the port where it does.

Names follow the rule at the head of `metric_names.py`, which is OpenTelemetry's for Prometheus. Knows what a figure is
and not what it means. Imported only where the port is wanted, for the library takes its time to import.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from services.common.metrics import Figure, Kind, Metrics, Name
from services.common.otlp import Resource

log = logging.getLogger(__name__)

_UNITS = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}
"""What stands behind a name; units in braces are not said."""


def family_name(name: Name) -> str:
    """A metric's name; a counter's has `_total` behind it, too."""
    plain, unit = _underscored(name.name), _UNITS.get(name.unit, "")
    return plain if plain.endswith(unit) else plain + unit


class Exposition(Collector):
    """All figures whenever Prometheus asks, and `target_info` that says what process they are about."""

    def __init__(self, metrics: Metrics, process: Resource) -> None:
        self._metrics, self._process = metrics, process

    def collect(self) -> Iterator[Metric]:
        """One family for all figures of a name."""
        about = {_underscored(key): str(value) for key, value in self._process.items()}
        yield InfoMetricFamily("target", "The process.", value=about)
        by_name: dict[str, list[Figure]] = {}
        for figure in self._metrics.collect():
            by_name.setdefault(figure.name.name, []).append(figure)
        for figures in by_name.values():
            yield _family(figures)


class Endpoint:
    """A port where the figures of a process can be read.

    Attributes:
        port: that was bound.
    """

    def __init__(self, exposition: Exposition, host: str, port: int) -> None:
        """Serves from now on, on threads of its own; on a free port when `port` is 0 or taken by another process.

        Raises:
            OSError: the host is not an address of this machine.
        """
        registry = CollectorRegistry()
        registry.register(exposition)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError:
            if port == 0:
                raise
            log.warning("port %d is taken, so the metrics are on another one", port)
            self._server, self._thread = start_http_server(0, host, registry)
        self.port: int = self._server.server_port
        log.info("metrics on http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Ends the threads and gives the port back; takes up to half a second."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _family(figures: Sequence[Figure]) -> Metric:
    """All figures of one name; an attribute that only some of them have is empty in the others."""
    name, kind = figures[0].name, figures[0].kind
    keys = sorted({key for figure in figures for key in figure.attributes})
    arguments = family_name(name), name.description
    labels = [_underscored(key) for key in keys]
    if kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(*arguments, labels=labels)
        for figure in figures:
            histogram.add_metric(_values(figure, keys), list(_buckets(figure)), figure.total)
        return histogram
    family = (CounterMetricFamily if kind is Kind.COUNTER else GaugeMetricFamily)(*arguments, labels=labels)
    for figure in figures:
        family.add_metric(_values(figure, keys), figure.value)
    return family


def _values(figure: Figure, keys: Iterable[str]) -> list[str]:
    return [figure.attributes.get(key, "") for key in keys]


def _buckets(figure: Figure) -> Iterator[tuple[str, float]]:
    """Upper bounds, and how many values do not exceed them."""
    bounds = [*map(floatToGoString, figure.bounds), "+Inf"]
    return zip(bounds, accumulate(figure.counts), strict=True)


def _underscored(name: str) -> str:
    return name.replace(".", "_")
