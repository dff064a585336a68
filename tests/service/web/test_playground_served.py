"""The playground before the real service."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load

from tests.service.web.playground import READY, ask_state, pixels, row_of, run_curl, show
from tests.support import tiny_artifact


@pytest.fixture(scope="module")
def two_models(server_process, tmp_path_factory):
    """A service of a refined model and of the backbone that it came from."""
    folder = tmp_path_factory.mktemp("models")
    refined = tiny_artifact(folder / "refined")
    raw = tiny_artifact(folder / "raw")
    (raw / "refinery.json").unlink()
    return server_process(
        "--model", f"raw={raw}", "--precision", "fp32", model=f"refined={refined}"
    )


@pytest.fixture
def page(browser, two_models):
    browser.open(two_models.url + "/")
    browser.wait_for(READY)
    return browser


def test_raw_and_refined_features_of_a_photograph_are_shown(page, photograph):
    show(page, photograph)

    for name in ("raw-colors", "refined-colors", "spurious", "raw-cosines", "refined-cosines"):
        picture = pixels(page, name)
        assert picture.shape == (21, 28, 4), name
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 5, name
    assert page.text("#raw-colors h2") == "Raw features"
    assert page.complaints == []
    assert page.foreign_requests(page.evaluate("location.href")) == []


def test_the_curl_line_answers_with_what_is_shown(page, photograph):
    show(page, photograph)
    page.click("#photograph .frame", x=6.5 / 28, y=9.5 / 21)

    answer = load(run_curl(page, photograph))

    features = answer["features.0"].astype("f4")
    units = features / np.linalg.norm(features, axis=-1, keepdims=True)
    cosines = np.array(ask_state(page, "[...state.refined.cosines]")).reshape(21, 28)
    np.testing.assert_allclose(cosines, units @ units[9, 6], atol=1e-4)
    registers = answer["spurious.0"][9, 6, 0]
    assert row_of(page, "selected")[6].replace("\u2212", "-") == f"{registers:.2f}"


def test_one_refined_model_is_compared_with_itself_without_border(
    browser, server_process, artifact, photograph
):
    server = server_process("--precision", "fp32", model=artifact)
    browser.open(server.url + "/")
    browser.wait_for(READY)

    show(browser, photograph)

    assert browser.text("#raw-colors h2") == "Refined backbone, without its border"
    assert any("register_width=0" in url for url in browser.requests)


def test_a_browser_that_was_given_a_key_sends_it_with_everything(
    browser, server_process, tmp_path, photograph
):
    key = "correct-horse-battery-staple"
    keys = tmp_path / "keys.txt"
    keys.write_text(f"alice {hashlib.sha256(key.encode()).hexdigest()}\n")
    server = server_process("--precision", "fp32", "--api-key-file", str(keys))
    assert server.client.get("/static/app.js").status_code == 401

    browser.open("about:blank")
    browser.call("Page.navigate", url=f"{server.url.replace('://', f'://:{key}@')}/")
    browser.wait_for(f"document.querySelector('#status') && {READY}")
    show(browser, photograph)

    assert browser.complaints == []
    assert key not in browser.text("#curl")


def test_the_description_of_the_api_names_every_option(browser, two_models):
    browser.open(two_models.url + "/docs")
    browser.wait_for("document.querySelector('.route')")

    options = browser.evaluate(
        "[...document.querySelectorAll('#post-features .items')[0].rows]"
        ".map((row) => row.cells[0].firstChild.textContent)"
    )

    assert {"size", "layers", "dtype", "layout", "boxes", "include"} <= set(options)
    assert browser.complaints == []
