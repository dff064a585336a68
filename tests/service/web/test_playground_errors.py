"""The playground when something goes wrong, or is not ready yet."""

from service.errors import InternalError
from tests.service.web.fake_service import fake_service, warming_up
from tests.service.web.playground import ANSWERED, FAILED, READY, pixels, show


def test_a_file_that_is_no_image_is_refused_in_words(page, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no pixels here")

    page.choose_file("#file", text)
    page.wait_for(FAILED)

    assert page.text("#error") == (
        "Image 0: 14 bytes that no supported format recognises. "
        "415 unsupported_image, request request-1"
    )
    assert page.evaluate("document.querySelector('#retry').hidden")


def test_after_an_error_the_next_photograph_is_shown(page, tmp_path, photograph):
    text = tmp_path / "notes.txt"
    text.write_text("no pixels here")
    page.choose_file("#file", text)
    page.wait_for(FAILED)

    show(page, photograph)

    assert page.evaluate("document.querySelector('#error').hidden")
    assert pixels(page, "raw-colors").shape == (21, 28, 4)


def test_a_service_that_warms_up_is_waited_for(browser, serve_app):
    url = serve_app(fake_service(failures=[warming_up()]))

    browser.open(url + "/")
    browser.wait_for(
        "document.querySelector('#status').textContent.startsWith('The service is loading')"
    )

    browser.wait_for(READY)


def test_a_failure_of_info_can_be_tried_again(browser, serve_app):
    failure = InternalError("the service failed; its log has the reason")
    failure.retryable = True
    browser.open(serve_app(fake_service(failures=[failure])) + "/")
    browser.wait_for(FAILED)

    assert "its log has the reason" in browser.text("#error")
    browser.click("#retry")

    browser.wait_for(READY)


def test_a_service_that_is_gone_is_said_to_be(page, photograph):
    page.evaluate("window.fetch = () => Promise.reject(new TypeError('failed to fetch'))")

    page.choose_file("#file", photograph)
    page.wait_for(FAILED)

    assert "does not answer at http://127.0.0.1" in page.text("#error")
    assert not page.evaluate("document.querySelector('#retry').hidden")


def test_the_last_of_several_quick_choices_is_shown(page, photograph):
    page.choose_file("#file", photograph)
    page.choose_option("#size", "224")
    page.choose_option("#size", "672")

    page.wait_for(ANSWERED)

    assert pixels(page, "refined-colors").shape == (32, 42, 4)
    assert page.complaints == []
