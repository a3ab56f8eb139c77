"""Long runs, drawn with fewer and longer windows: a plot has no room for a thousand of them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from beamline_client.load.histograms import decoded, encoded, new_histogram, percentile_ms
from beamline_client.load.report import ServerSample, Window

ItemT = TypeVar("ItemT")


def coarser_windows(windows: Sequence[Window], at_most: int) -> list[Window]:
    """Neighbours put together, so that no more are left; they lose nothing but the time between them."""
    return _grouped(windows, at_most, _one_window)


def coarser_samples(samples: Sequence[ServerSample], at_most: int) -> list[ServerSample]:
    """Means over neighbours, so that no more are left."""
    return _grouped(samples, at_most, _one_sample)


def _grouped(items: Sequence[ItemT], at_most: int, together: Callable[[Sequence[ItemT]], ItemT]) -> list[ItemT]:
    size = -(-len(items) // at_most)
    if size <= 1:
        return list(items)
    return [together(items[i : i + size]) for i in range(0, len(items), size)]


def _one_window(windows: Sequence[Window]) -> Window:
    histogram, answers = new_histogram(), []
    for window in windows:
        before = histogram.get_total_count()
        if window.histogram is not None:
            histogram.add(decoded(window.histogram))
        answers.append(histogram.get_total_count() - before)
    some = histogram.get_total_count() > 0
    return Window(
        start_s=windows[0].start_s,
        seconds=windows[-1].start_s + windows[-1].seconds - windows[0].start_s,
        offered=sum(window.offered for window in windows),
        answered=sum(window.answered for window in windows),
        failed=sum(window.failed for window in windows),
        tokens=sum(window.tokens for window in windows),
        p50_ms=percentile_ms(histogram, 50) if some else None,
        p99_ms=percentile_ms(histogram, 99) if some else None,
        queue_ms=_mean([window.queue_ms for window in windows], answers),
        encode_ms=_mean([window.encode_ms for window in windows], answers),
        decode_ms=_mean([window.decode_ms for window in windows], answers),
        histogram=encoded(histogram) if some else None,
    )


def _one_sample(samples: Sequence[ServerSample]) -> ServerSample:
    weights = [1] * len(samples)
    return ServerSample(
        at_s=samples[-1].at_s,
        rows_per_step=_mean([sample.rows_per_step for sample in samples], weights),
        step_ms=_mean([sample.step_ms for sample in samples], weights),
        queued_requests=sum(sample.queued_requests for sample in samples) / len(samples),
        running_rows=sum(sample.running_rows for sample in samples) / len(samples),
        requests_per_s=sum(sample.requests_per_s for sample in samples) / len(samples),
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Of those that are there; None if there are none."""
    there = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None and weight]
    return sum(value * weight for value, weight in there) / sum(weight for _, weight in there) if there else None
