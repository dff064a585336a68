"""Images by URL in a request, with a web server of the test's own."""

import http.server
import threading

import numpy as np
import pytest
from safetensors.numpy import load

from tests.support import encoded, noise_image

PHOTO = encoded(noise_image(80, 112))


class Files(http.server.BaseHTTPRequestHandler):
    """A photograph at /photo, nothing anywhere else."""

    def do_GET(self):
        found = self.path == "/photo"
        self.send_response(200 if found else 404)
        self.send_header("content-length", str(len(PHOTO) if found else 0))
        self.end_headers()
        self.wfile.write(PHOTO if found else b"")

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def files():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def post(client, *urls, **options):
    body = {"images": [{"url": url} for url in urls], "options": options}
    return client.post("/features", json=body)


def test_urls_are_refused_unless_the_operator_allows_their_host(client):
    response = post(client, "https://example.com/cat.jpg")

    assert response.status_code == 403
    assert response.json()["error"]["code"] == "url_refused"
    assert "--allow-url-hosts" in response.json()["error"]["message"]


def test_an_image_behind_an_allowed_url_is_that_image(serve, files):
    with serve(allow_url_hosts=files) as client:
        by_url = post(client, f"{files}/photo")
        by_bytes = client.post("/features", content=PHOTO, headers={"content-type": "image/png"})

    assert by_url.status_code == 200, by_url.text
    assert by_bytes.headers["x-cache"] == "hit"  # one file, one name in the cache
    np.testing.assert_array_equal(
        load(by_url.content)["features.0"], load(by_bytes.content)["features.0"]
    )


def test_a_url_that_cannot_be_had_is_told_with_its_index(serve, files):
    with serve(allow_url_hosts=files) as client:
        missing = post(client, f"{files}/photo", f"{files}/other")
        foreign = post(client, "http://169.254.169.254/latest")
        partial = post(client, f"{files}/other", f"{files}/photo", partial=True)

    assert (missing.status_code, missing.json()["error"]["code"]) == (502, "url_not_fetched")
    assert missing.json()["error"]["index"] == 1
    assert (foreign.status_code, foreign.json()["error"]["index"]) == (403, 0)
    assert sorted(load(partial.content)) == ["features.1"]


def test_files_behind_urls_are_bounded_together_like_a_body(serve, files):
    with serve(allow_url_hosts=files, max_body_bytes=2 * len(PHOTO)) as client:
        few = post(client, *[f"{files}/photo"] * 2)
        many = post(client, *[f"{files}/photo"] * 4)

    assert few.status_code == 200, few.text
    assert (many.status_code, many.json()["error"]["code"]) == (413, "body_too_large")
    assert "together" in many.json()["error"]["message"]
