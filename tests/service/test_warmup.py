import logging

from service import warmup
from service.warmup import WarmUp, warm_up


def test_warm_up_measures_what_the_company_of_an_image_changes(watched_encoder):
    result = warm_up(watched_encoder, [(64, 64)], max_tokens=1000)

    assert watched_encoder.batches == [*[(4, 3, 64, 64)] * 2, *[(1, 3, 64, 64)] * 4]
    assert result.tokens_per_second > 0
    assert 0 <= result.measured_relative_error <= result.max_relative_error == 1e-3
    assert 1 >= round(result.measured_cosine, 6) >= result.min_cosine


def test_a_promise_that_does_not_hold_is_logged(watched_encoder, monkeypatch, caplog):
    monkeypatch.setitem(warmup._MAX_RELATIVE_ERROR, "fp32", -1.0)

    with caplog.at_level(logging.WARNING):
        warm_up(watched_encoder, [(64, 64)], max_tokens=1000)

    assert "features depend on their batch" in caplog.text


def test_warm_up_stays_within_the_budget_of_a_batch(watched_encoder):
    warm_up(watched_encoder, [(64, 64)], max_tokens=2 * watched_encoder.num_tokens(64, 64))

    assert watched_encoder.batches == [*[(2, 3, 64, 64)] * 2, *[(1, 3, 64, 64)] * 2]


def test_the_bound_on_the_cosine_follows_from_the_relative_error():
    # The token that is furthest in angle at a distance e of a unit vector has cos = sqrt(1 - e^2).
    assert WarmUp(1.0, 0.6, 0.0, 1.0).min_cosine == 0.8


def test_every_bucket_is_warmed_up_alone_and_in_a_batch(watched_encoder):
    warm_up(watched_encoder, [(64, 64), (32, 96)], max_tokens=1000)

    assert watched_encoder.batches[:2] == [(4, 3, 32, 96), (1, 3, 32, 96)]
