"""The same numbers as prometheus_client's own histogram, whatever the values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from monitoring.bulk_histogram import BulkHistogram

BOUNDS = (0.1, 0.5, 1.0, 8.0)
VALUES = st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 20, allow_subnormal=False)), max_size=30)


@given(st.lists(VALUES, max_size=4))
def test_equals_the_one_that_counts_one_by_one(batches: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("deepsplit_x", "X.", ["stage"], buckets=BOUNDS, registry=ours)
    single = Histogram("deepsplit_x", "X.", ["stage"], buckets=BOUNDS, registry=theirs)
    for number, values in enumerate(batches):
        stage = "ab"[number % 2]
        bulk.observe(values, stage)
        for value in values:
            single.labels(stage).observe(value)
        for metric in theirs.collect():
            for sample in metric.samples:
                if sample.name.endswith("_created"):
                    continue
                found = ours.get_sample_value(sample.name, sample.labels)
                assert found is not None
                assert abs(found - sample.value) < 1e-9


def test_without_a_label_it_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    bulk = BulkHistogram("deepsplit_y", "Y.", buckets=BOUNDS, registry=registry)
    assert registry.get_sample_value("deepsplit_y_count") == 0
    bulk.observe([0.1, 100.0])
    assert registry.get_sample_value("deepsplit_y_bucket", {"le": "0.1"}) == 1
    assert registry.get_sample_value("deepsplit_y_bucket", {"le": "+Inf"}) == 2
    assert b"# TYPE deepsplit_y histogram" in generate_latest(registry)
