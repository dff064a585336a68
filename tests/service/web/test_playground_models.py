"""The playground before services of several models, of one, and with other options."""

import numpy as np

from tests.service.web.fake_service import RAW, REFINED, model
from tests.service.web.playground import (
    pixels,
    row_of,
    show,
)


def test_size_numbers_and_models_are_what_is_asked_for(open_page, photograph):
    page = open_page(RAW, model("raw-2", is_refined=False), REFINED)
    page.choose_option("#size", "")
    page.choose_option("#dtype", "float32")
    page.choose_option("#raw-model", "1")

    show(page, photograph)

    asked = [url.split("?")[1] for url in page.requests if "/features?" in url]
    assert sorted(asked) == [
        "model=demo&dtype=float32&include=spurious",
        "model=raw-2&dtype=float32",
    ]
    assert "14 × 14 patches" in page.text("#raw-colors .note")


def test_without_a_raw_model_the_refined_one_is_shown_without_its_border(open_page, photograph):
    page = open_page(REFINED)

    show(page, photograph)

    assert page.text("#raw-colors h2") == "Refined backbone, without its border"
    assert page.evaluate("!document.querySelector('#no-raw-model').hidden")
    assert "--model raw=models/demo-pretrained" in page.text("#no-raw-model")
    assert any("model=demo&size=448&register_width=0" in url for url in page.requests)


def test_without_a_refined_model_the_raw_side_works_alone(open_page, photograph):
    page = open_page(RAW)

    show(page, photograph)

    assert len(np.unique(pixels(page, "raw-colors").reshape(-1, 4), axis=0)) > 5
    assert page.text("#refined-colors .empty") == "No refined model is served."
    assert row_of(page, "selected")[4:] == ["1.00", "–", "–", "–"]
    assert "model=folder/raw" in page.text("#curl")


def test_models_with_other_channels_get_a_basis_each(open_page, photograph):
    page = open_page(model("wide", is_refined=False, channels=40), REFINED)

    show(page, photograph)

    assert "40 channels" in page.text("#raw-colors .note")
    assert len(np.unique(pixels(page, "raw-colors").reshape(-1, 4), axis=0)) > 5
    assert page.complaints == []
