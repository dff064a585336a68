import numpy as np
import pytest

from trainer.evaluate.intervals import bootstrap, over_seeds, student_t


def test_three_seeds_get_the_interval_of_the_textbook():
    interval = over_seeds([20.0, 21.0, 22.0])

    # t(0.975, 2) = 4.303, standard error 1 / sqrt(3)
    assert interval.mean == 21
    assert interval.std == pytest.approx(1)
    assert interval.high - interval.mean == pytest.approx(4.303 / 3**0.5)
    assert interval.mean - interval.low == pytest.approx(4.303 / 3**0.5)
    assert interval.count == 3


def test_one_seed_has_a_mean_and_no_width():
    interval = over_seeds([20.0])

    assert (interval.mean, interval.std, interval.low, interval.high) == (20, 0, 20, 20)


@pytest.mark.parametrize("of", [over_seeds, bootstrap])
def test_no_values_are_refused(of):
    with pytest.raises(ValueError, match="no values"):
        of([])


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (30, 2.042), (31, 2.0395), (100, 1.984), (10**6, 1.96)]
)
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert student_t(degrees) == pytest.approx(expected, abs=6e-4)


def test_the_bootstrap_finds_the_standard_error_of_many_images():
    values = np.random.default_rng(1).normal(5, 2, 400).tolist()

    interval = bootstrap(values)

    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert interval == bootstrap(values)


def test_an_interval_covers_the_mean_about_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    found = [over_seeds(generator.normal(7, 3, 4).tolist()) for _ in range(1000)]

    covered = sum(each.low <= 7 <= each.high for each in found)

    assert 930 <= covered <= 970
