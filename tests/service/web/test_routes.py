"""The pages' files as they are sent: types, caching, and what browsers are told to refuse."""

import re
from importlib import resources

import pytest
from starlette.testclient import TestClient

from tests.service.web.fake_service import fake_service

FILES = [
    f"/static/{entry.name}" for entry in resources.files("service.web").joinpath("static").iterdir()
]
PAGES = ["/", "/docs"]


@pytest.fixture
def client():
    with TestClient(fake_service()) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_a_file_says_what_it_is(client, path, media_type):
    response = client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert client.head(path).headers["content-length"] == str(len(response.content))


@pytest.mark.parametrize("path", PAGES + FILES)
def test_browsers_are_told_to_refuse_what_is_not_from_this_service(client, path):
    policy = client.get(path).headers["content-security-policy"]

    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'self'"
    assert directives["img-src"] == "'self' blob: data:"
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", PAGES + FILES)
def test_a_file_that_a_browser_has_is_not_sent_again(client, path):
    first = client.get(path)

    again = client.get(path, headers={"if-none-match": first.headers["etag"]})
    other = client.get(path, headers={"if-none-match": '"another"'})

    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert other.content == first.content


def test_a_proxy_that_weakened_the_tag_is_understood(client):
    etag = client.get("/").headers["etag"]

    assert client.get("/", headers={"if-none-match": f'"x", W/{etag}'}).status_code == 304


@pytest.mark.parametrize("path", PAGES)
def test_what_a_page_refers_to_is_served(client, path):
    page = client.get(path).text

    references = re.findall(r'(?:src|href)="(static/[^"]+)"', page)
    assert references
    for reference in references:
        assert client.get(f"/{reference}").status_code == 200, reference


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_no_inline_scripts_or_styles(client, path):
    page = client.get(path).text

    assert "<style" not in page
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    assert not re.search(r"\s(style|on\w+)=", page)


@pytest.mark.parametrize("path", PAGES + FILES)
def test_no_file_names_another_server(client, path):
    addresses = set(re.findall(r"https?://[\w.-]+", client.get(path).text))

    assert addresses <= {"http://www.w3.org"}  # the name space of SVG, which nobody fetches


def test_an_unknown_file_is_an_error_that_names_the_nearest(client):
    response = client.get("/static/ap.js")

    assert response.status_code == 404
    assert "did you mean 'app.js'?" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["..%2froutes.py", "%2e%2e/routes.py", "routes.py"])
def test_no_other_file_can_be_reached(client, name):
    assert client.get(f"/static/{name}").status_code == 404
