"""The served OpenAPI document against the service: nothing breaks it, nothing is undocumented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from service.options import FeatureOptions
from tests.support import encoded, noise_image

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
PHOTO = encoded(noise_image(32, 48), "JPEG")
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same requests each time: a failure can be looked at
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def contract(server_process):
    """The document of a running service, and the service."""
    server = server_process("--max-body-bytes", "200000", "--request-seconds", "20")
    return server, schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def operations(document):
    return {operation.ok().label: operation.ok() for operation in document.get_all_operations()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "label",
    [
        "GET /info",
        "GET /livez",
        "GET /healthz",
        "GET /readyz",
        "GET /startupz",
        "GET /admin/models",
        "POST /admin/models",
        "DELETE /admin/models/{name}",
        "POST /features",
    ],
)
def test_generated_requests_get_documented_answers(contract, label):
    server, document = contract
    operation = operations(document)[label]

    @EXAMPLES
    @given(case=operation.as_strategy())
    def ask(case):
        answer = case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=30)
        # A deadline of a millisecond is no fault of the server, everything else from 500 on is.
        assert answer.status_code < 500 or answer.status_code == 504, answer.text

    ask()

    assert server.process.poll() is None
    assert server.readyz() == 200


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["-1", "0", "1e9", "[1,2]", "true", "null", "9" * 40]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(list(FeatureOptions.model_fields)) | TEXTS


@pytest.mark.slow
def test_no_options_whatsoever_break_the_service(contract):
    server, document = contract
    operation = operations(document)["POST /features"]

    @settings(EXAMPLES, max_examples=150)
    @given(
        query=st.dictionaries(NAMES, TEXTS, max_size=3),
        options=st.dictionaries(NAMES, VALUES, max_size=3),
        accept=st.sampled_from(
            ["*/*", "application/json", "application/x-npy", "image/png", "text/html", ";q=x"]
        ),
    )
    def ask(query, options, accept):
        case = operation.Case(
            query=query,
            headers={"accept": accept},
            media_type="application/json",
            body={"images": [{"data": "AAAA"}], "options": options},
        )
        answer = case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=30)
        assert answer.status_code < 500, answer.text

    ask()

    assert server.readyz() == 200


@pytest.mark.slow
def test_damaged_images_cost_nobody_anything(contract):
    server, _ = contract

    @settings(EXAMPLES, max_examples=100)
    @given(place=st.integers(0, len(PHOTO) - 1), junk=st.binary(min_size=1, max_size=8))
    def ask(place, junk):
        damaged = PHOTO[:place] + junk + PHOTO[place + len(junk) :]
        answer = server.client.post(
            "/features?size=32", content=damaged, headers={"content-type": "image/jpeg"}
        )
        assert answer.status_code in (200, 413, 415, 422), answer.text

    ask()

    assert server.readyz() == 200
