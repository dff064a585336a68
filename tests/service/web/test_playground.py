"""The playground in a browser, before a service that answers at once."""

import numpy as np
import pytest
from safetensors.numpy import load

from tests.service.web.playground import (
    ANSWERED,
    ask_state,
    pixels,
    row_of,
    run_curl,
    show,
)

PICTURES = ("photograph", "raw-colors", "refined-colors", "spurious", "raw-cosines")


def test_it_opens_without_complaints_and_asks_nobody_else(page):
    url = page.evaluate("location.href")

    assert page.complaints == []
    assert page.foreign_requests(url) == []
    assert url + "static/app.js" in page.requests


def test_a_photograph_becomes_six_pictures(page, photograph):
    show(page, photograph)

    assert page.complaints == []
    assert page.foreign_requests(page.evaluate("location.href")) == []
    for name in (*PICTURES, "refined-cosines"):
        picture = pixels(page, name)
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 5, name
        assert (picture[..., 3] == 255).all(), name
    assert pixels(page, "refined-colors").shape == (21, 28, 4)
    assert "21 × 28 patches of 24 channels" in page.text("#refined-colors .note")
    assert page.text("#photograph .note") == "a blue day.png, 320 × 240 px"


def test_the_middle_is_selected_until_somebody_chooses(page, photograph):
    show(page, photograph)

    assert row_of(page, "selected")[:2] == ["10", "14"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_click_on_any_picture_shows_what_resembles_that_patch(page, photograph, name):
    show(page, photograph)

    page.click(f"#{name} .frame", x=(6 + 0.3) / 28, y=(9 + 0.7) / 21)

    row, column, x, y, *cosines = row_of(page, "selected")
    assert (row, column, x, y) == ("9", "6", "69–80", "103–114")
    assert cosines[:2] == ["1.00", "1.00"]
    for side in ("raw", "refined"):
        values = np.array(ask_state(page, f"[...state.{side}.cosines]"))
        assert values[9 * 28 + 6] == pytest.approx(1, abs=1e-5)
        assert values.max() <= 1 + 1e-5
        brightest = pixels(page, f"{side}-cosines")[9, 6].tolist()
        assert brightest == [254, 250, 214, 255]


def test_cosines_are_those_of_the_served_features(page, photograph):
    show(page, photograph)
    page.click("#photograph .frame", x=(6 + 0.5) / 28, y=(9 + 0.5) / 21)
    served = load(run_curl(page, photograph))["features.0"].astype("f4")

    shown = np.array(ask_state(page, "[...state.refined.cosines]")).reshape(21, 28)

    units = served / np.linalg.norm(served, axis=-1, keepdims=True)
    np.testing.assert_allclose(shown, units @ units[9, 6], atol=1e-5)


def test_arrow_keys_move_the_patch_and_stop_at_the_edge(page, photograph):
    show(page, photograph)
    page.click("#raw-colors .frame", x=0.5 / 28, y=0.5 / 21)

    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.press(key)

    assert row_of(page, "selected")[:2] == ["0", "1"]
    assert page.text("#announcement") == "Row 0, column 1 selected."


def test_the_pointer_reads_a_patch_without_selecting_it(page, photograph):
    show(page, photograph)
    page.hover("#spurious .frame", x=0.5 / 28, y=20.5 / 21)

    assert row_of(page, "hovered")[:4] == ["20", "0", "0–11", "229–240"]
    assert row_of(page, "selected")[:2] == ["10", "14"]

    page.hover("h1")
    assert row_of(page, "hovered") == ["–"] * 8


def test_the_spurious_map_shows_the_chosen_score(page, photograph):
    show(page, photograph)
    page.click("#photograph .frame", x=0.5 / 28, y=0.5 / 21)
    scores = np.array(ask_state(page, "[...state.refined.spurious.norm]"))

    page.choose_option("#score", "norm")

    low, high = page.evaluate(
        "[...document.querySelectorAll('#spurious output')].map((o) => o.textContent)"
    )
    assert (low, high) == (f"\u2212{-scores.min():.2f}", f"{scores.max():.2f}")
    assert row_of(page, "selected")[7].replace("\u2212", "-") == f"{scores[0]:.2f}"


def test_a_photograph_can_be_dropped_and_pasted(page):
    drawn = """(async (name) => {
        const canvas = new OffscreenCanvas(64, 32);
        const context = canvas.getContext("2d");
        context.fillStyle = "orange";
        context.fillRect(8, 8, 20, 9);
        const file = new File([await canvas.convertToBlob()], name, { type: "image/png" });
        const transfer = new DataTransfer();
        transfer.items.add(file);
        document.dispatchEvent(%s);
    })"""
    drop = 'new DragEvent("drop", { dataTransfer: transfer, cancelable: true })'
    paste = 'new ClipboardEvent("paste", { clipboardData: transfer })'

    for kind, event in (("dropped", drop), ("pasted", paste)):
        page.evaluate(f"{drawn % event}('{kind}.png')")
        note = "document.querySelector('#photograph .note').textContent"
        page.wait_for(f"{note} === '{kind}.png, 64 × 32 px'")  # the size is known a moment later
        page.wait_for(ANSWERED)


def test_results_do_not_move_the_page(page, photograph):
    place = "document.querySelector('#patch-title').getBoundingClientRect().top + scrollY"
    show(page, photograph)
    before = page.evaluate(place)

    page.choose_option("#size", "224")
    while_waiting = page.evaluate(place)
    page.wait_for(ANSWERED)

    assert while_waiting == page.evaluate(place) == before


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_is_wider_than_the_window(page, photograph, width):
    page.resize(width, 900)
    show(page, photograph)

    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    page.call("Emulation.clearDeviceMetricsOverride")


def test_everything_that_takes_input_has_a_name(page, photograph):
    show(page, photograph)

    nodes = page.call("Accessibility.getFullAXTree")["nodes"]

    roles = {"button", "combobox", "radio", "link", "application"}
    named = [n for n in nodes if n.get("role", {}).get("value") in roles and not n["ignored"]]
    assert len([n for n in named if n["role"]["value"] == "application"]) == 6
    assert all(n["name"]["value"].strip() for n in named)
