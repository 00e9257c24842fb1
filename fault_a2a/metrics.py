"""Prometheus metrics of one rank's buffers; needs prometheus-client (``pip install 'fault_a2a[metrics]'``).

Nothing is counted on the way of a round: a scrape reads what the core has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fault_a2a.buffer import Buffer

BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# Only these tell when the rank was last well: one that stalls still beats.
_BEATLESS = ("exit", "silence")


def _prometheus() -> Any:
    try:
        import prometheus_client.core
    except ImportError as error:
        raise ImportError("metrics need prometheus-client; run `pip install 'fault_a2a[metrics]'`") from error
    return prometheus_client


class Metrics:
    """A collector for a Prometheus registry: ``registry.register(Metrics(lambda: [buffer]))``.

    Args:
        buffers: returns the buffers of this rank, at each scrape. Of several, counters are added up, and the
            newest epoch and the fewest active ranks are shown.
    """

    def __init__(self, buffers: Callable[[], Iterable[Buffer]]) -> None:
        self._buffers = buffers
        self._core = _prometheus().core

    def collect(self) -> Iterator[Any]:
        buffers = list(self._buffers())
        if not buffers:
            return
        views = [buffer.view for buffer in buffers]
        rank = str(buffers[0].rank)
        yield self._gauge(
            "view_epoch", "Generation of the membership that this rank uses", rank, max(v.epoch for v in views)
        )
        yield self._gauge(
            "active_ranks", "Ranks in the view that this rank uses", rank, min(len(v.active_ranks) for v in views)
        )
        stats = [buffer.verbs.stats() for buffer in buffers]
        for name, field, words in (
            ("lost_choices", "num_lost", "Choices of this rank's tokens that were lost in their round"),
            ("unroutable_choices", "num_unroutable", "Choices of this rank's tokens whose expert no active rank holds"),
            ("rounds", "num_rounds", "Rounds that this rank has received"),
        ):
            counter = self._core.CounterMetricFamily(f"fault_a2a_{name}", words, labels=["rank"])
            counter.add_metric([rank], sum(one[field] for one in stats))
            yield counter
        yield from self._of_evidence(rank, buffers)
        yield from self._of_sources(rank, buffers)

    def _gauge(self, name: str, words: str, rank: str, value: float) -> Any:
        gauge = self._core.GaugeMetricFamily(f"fault_a2a_{name}", words, labels=["rank"])
        gauge.add_metric([rank], value)
        return gauge

    def _of_evidence(self, rank: str, buffers: list[Buffer]) -> Iterator[Any]:
        suspicions: dict[str, int] = {}
        detect: dict[str, list[float]] = {}
        agree: list[float] = []
        for buffer in buffers:
            evidence = buffer.evidence()
            for one in evidence:
                suspicions[one.kind] = suspicions.get(one.kind, 0) + 1
                if one.kind in _BEATLESS:
                    # The beat as it stands now: the core keeps no older one. A later one than the evidence makes 0.
                    beat_ns = buffer.core.last_beat_ns(one.rank)
                    detect.setdefault(one.kind, []).append(max(one.at_ns - beat_ns, 0) / 1e9)
            agree += _agreed_after_s(buffer)
        counter = self._core.CounterMetricFamily(
            "fault_a2a_suspicions", "Evidence that this rank found against others", labels=["rank", "evidence"]
        )
        for kind, count in sorted(suspicions.items()):
            counter.add_metric([rank, kind], count)
        yield counter
        histogram = self._core.HistogramMetricFamily(
            "fault_a2a_detect_seconds",
            "From the last beat of a rank to this rank's evidence against it; 0 once it beats again or is replaced",
            labels=["rank", "evidence"],
        )
        for kind, seconds in sorted(detect.items()):
            histogram.add_metric([rank, kind], _in_buckets(seconds), sum(seconds))
        yield histogram
        histogram = self._core.HistogramMetricFamily(
            "fault_a2a_agree_seconds",
            "From this rank's first evidence against ranks to the view without them",
            labels=["rank"],
        )
        histogram.add_metric([rank], _in_buckets(agree), sum(agree))
        yield histogram

    def _of_sources(self, rank: str, buffers: list[Buffer]) -> Iterator[Any]:
        sums: dict[int, list[float]] = {}
        for buffer in buffers:
            for one in buffer.source_stats():
                line = (one.wait_us / 1e6, one.late_us / 1e6, float(one.num_rows), float(one.num_failures))
                sums[one.rank] = [a + b for a, b in zip(sums.get(one.rank, [0.0] * 4), line, strict=True)]
        for idx, (name, words) in enumerate(
            (
                ("wait_seconds", "Time in which this rank did nothing but wait for a source"),
                ("late_seconds", "Time in which a word of a source was missing while this rank was ready for it"),
                ("source_rows", "Rows that came from a source"),
                ("source_failures", "Dispatches and answers of a source that were not taken whole"),
            )
        ):
            counter = self._core.CounterMetricFamily(f"fault_a2a_{name}", words, labels=["rank", "source"])
            for source, summed in sums.items():
                counter.add_metric([rank, str(source)], summed[idx])
            yield counter


def _agreed_after_s(buffer: Buffer) -> list[float]:
    """Of each view that left ranks out: since the first evidence against one of them."""
    found = []
    views, evidence = buffer.views(), buffer.evidence()
    for (before, since_ns), (after, at_ns) in zip(views, views[1:], strict=False):
        gone = set(before.active_ranks) - set(after.active_ranks)
        first = min(
            (one.at_ns for one in evidence if one.rank in gone and since_ns <= one.at_ns <= at_ns), default=None
        )
        if first is not None:
            found.append((at_ns - first) / 1e9)
    return found


def _in_buckets(seconds: list[float]) -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = [(str(most), sum(one <= most for one in seconds)) for most in BUCKETS_S]
    return [*rows, ("+Inf", len(seconds))]


def serve(buffers: Callable[[], Iterable[Buffer]], port: int) -> Callable[[], None]:
    """Serves these metrics, and nothing else, at ``http://<this host>:port/metrics`` from a thread of its own.

    Returns:
        A function that ends the serving.

    Raises:
        ImportError: prometheus-client is not installed.
        OSError: the port is taken.
    """
    prometheus = _prometheus()
    registry = prometheus.CollectorRegistry()
    registry.register(Metrics(buffers))
    server, thread = prometheus.start_http_server(port, registry=registry)

    def end() -> None:
        server.shutdown()
        thread.join()

    return end
