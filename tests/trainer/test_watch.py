import logging

import pytest

from trainer.watch import WINDOW, FilterWatch


def steps(watch, count, first=1, **values):
    for step in range(first, first + count):
        watch.step(step, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"clean_fixed_pattern": 0.01},
            ["fixed_pattern", "1.0 %", "raise filters.fp_gp"],
        ),
        ({"clean_fixed_pattern": 0.99}, ["99.0 %", "lower filters.fp_gp.threshold"]),
        ({"clean_global_proxy": 0.0}, ["global_proxy", "filters.fp_gp.criterion=zscore"]),
        ({"clean_register_guided": 0.02}, ["raise filters.register_guided.threshold"]),
        ({"clean_register_guided": 1.0}, ["100.0 %", "lower filters.register_guided.threshold"]),
        ({"clean_attention_hijack": 0.03}, ["filters.attention_hijack.layers"]),
        ({"clean": 0.04}, ["all filters together keep 4.0 %"]),
    ],
)
def test_a_filter_that_takes_all_or_nothing_is_told_with_share_and_remedy(caplog, values, words):
    steps(FilterWatch(), WINDOW, **values)

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [word for word in words if word not in record.getMessage()] == []
    assert f"steps 1 to {WINDOW}" in record.getMessage()


def test_shares_in_between_and_few_steps_are_left_alone(caplog):
    steps(FilterWatch(), 3 * WINDOW, clean_fixed_pattern=0.06, clean_global_proxy=0.94, clean=0.99)
    steps(FilterWatch(), WINDOW - 1, clean_fixed_pattern=0.0)

    assert caplog.records == []


def test_a_single_bad_step_is_not_a_window(caplog):
    watch = FilterWatch()
    steps(watch, WINDOW, clean_fixed_pattern=0.5)
    steps(watch, 1, clean_fixed_pattern=0.0)

    assert caplog.records == []


def test_a_filter_is_told_again_only_after_it_had_recovered(caplog):
    watch = FilterWatch()
    steps(watch, 3 * WINDOW, clean_fixed_pattern=0.0, clean_global_proxy=0.5)
    told = len(caplog.records)
    steps(watch, WINDOW, clean_fixed_pattern=0.5, clean_global_proxy=0.5)
    steps(watch, WINDOW, clean_fixed_pattern=0.0, clean_global_proxy=0.5)

    assert told == 1
    assert len(caplog.records) == 2
