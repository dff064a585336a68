"""The curl line of the playground, run in a shell."""

import pytest
from safetensors.numpy import load

from tests.service.web.playground import ANSWERED, run_curl, show


@pytest.mark.parametrize(("side", "include"), [("refined", "spurious"), ("raw", None)])
def test_the_curl_line_makes_the_request_of_the_page(page, photograph, side, include):
    show(page, photograph)
    page.choose_option("#size", "224")
    page.wait_for(ANSWERED)

    page.evaluate(f"document.querySelector('[name=curl][value={side}]').click()")

    url = page.text("#curl").split("'")[-2]
    assert url in page.requests
    assert page.text("#curl") == (
        "curl -sSf -H 'Content-Type: image/png' --data-binary '@a blue day.png' \\\n"
        f"     -o 'a blue day.safetensors' '{url}'"
    )
    tensors = load(run_curl(page, photograph))
    assert tensors["features.0"].shape == (10, 14, 24)
    assert ("spurious.0" in tensors) == bool(include)


def test_the_curl_line_quotes_names_that_a_shell_would_read(page, tmp_path, photograph):
    awkward = tmp_path / "it's $(here) & now.png"
    awkward.write_bytes(photograph.read_bytes())

    show(page, awkward)

    assert load(run_curl(page, awkward))["features.0"].shape == (21, 28, 24)


def test_the_copy_button_copies_the_command(page):
    page.call(
        "Browser.grantPermissions",
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
    )
    page.call("Page.bringToFront")

    page.click("#copy")
    page.wait_for("document.querySelector('#copy').textContent === 'Copied'")

    assert page.evaluate("navigator.clipboard.readText()") == page.text("#curl")
