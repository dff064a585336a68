"""What the page computes, held against NumPy."""

import base64
import json

import numpy as np
import pytest
from safetensors.numpy import save

from tests.service.web.fake_service import fake_service


@pytest.fixture
def page(browser, serve_app):
    """A page of the service's origin, where its modules can be imported."""
    browser.open(serve_app(fake_service()) + "/static/icon.svg")
    return browser


def in_page(page, expression, **arrays):
    """The value of an expression over modules and float32 arrays."""
    bytes_of = {
        name: base64.b64encode(np.ascontiguousarray(array, dtype="<f4")).decode()
        for name, array in arrays.items()
    }
    return page.evaluate(
        f"""(async () => {{
            const floats = (text) =>
                new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
            const given = Object.fromEntries(
                Object.entries({json.dumps(bytes_of)}).map(([k, v]) => [k, floats(v)]));
            const pca = await import("/static/pca.js");
            const vectors = await import("/static/vectors.js");
            const {{ readSafetensors }} = await import("/static/safetensors.js");
            return {expression};
        }})()"""
    )


def directions_of(page, channels, count=3, **sets):
    names = ", ".join(f"given.{name}" for name in sets)
    call = f"pca.principalDirections([{names}], {channels}, {count})"
    return np.array(in_page(page, f"{call}.directions.map((d) => [...d])", **sets))


def numpy_directions(vectors_NC, count=3):
    centred = vectors_NC - vectors_NC.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = np.take_along_axis(directions, abs(directions).argmax(1)[:, None], 1)
    return directions * np.sign(largest)


def spectrum_of(rows, channels, seed=0, decay=0.9):
    """Vectors whose variances fall slowly, around a mean that is far from zero."""
    generator = np.random.default_rng(seed)
    scales = decay ** np.arange(channels)
    turned = np.linalg.qr(generator.standard_normal((channels, channels)))[0]
    vectors = generator.standard_normal((rows, channels)) * scales @ turned + 3
    return vectors.astype(np.float32)


@pytest.mark.parametrize(("rows", "channels"), [(532, 192), (40, 96), (300, 3), (7, 5)])
def test_principal_directions_are_those_of_numpy(page, rows, channels):
    vectors = spectrum_of(rows, channels)

    directions = directions_of(page, channels, vectors=vectors)

    np.testing.assert_allclose(directions, numpy_directions(vectors.astype("f8")), atol=1e-4)


def test_two_sets_share_one_basis(page):
    left, right = spectrum_of(200, 32, seed=1), spectrum_of(150, 32, seed=2) + 1

    directions = directions_of(page, 32, left=left, right=right)

    together = np.concatenate([left, right]).astype("f8")
    np.testing.assert_allclose(directions, numpy_directions(together), atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_vectors_of_low_rank_have_directions_too(page, rank):
    generator = np.random.default_rng(3)
    vectors = generator.standard_normal((50, rank)) @ generator.standard_normal((rank, 24)) + 1

    directions = directions_of(page, 24, vectors=vectors)

    np.testing.assert_allclose(directions @ directions.T, np.eye(3), atol=1e-6)
    expected = numpy_directions(vectors.astype("f4").astype("f8"), rank)
    np.testing.assert_allclose(directions[:rank], expected, atol=1e-4)


def test_colours_reach_from_the_first_to_the_last_percentile(page):
    vectors = spectrum_of(400, 16)

    call = "[...pca.principalColors([given.vectors], 16)[0]]"
    colours = np.array(in_page(page, call, vectors=vectors)).reshape(-1, 4)

    wide = vectors.astype("f8")
    components = (wide - wide.mean(0)) @ numpy_directions(wide).T
    ascending = np.sort(components, axis=0)
    low, high = ascending[round(0.01 * 399)], ascending[round(0.99 * 399)]
    expected = np.clip((components - low) / (high - low), 0, 1) * 255
    assert abs(colours[:, :3] - expected).max() <= 1
    assert (colours[:, 3] == 255).all()


def test_vectors_that_are_all_equal_become_one_colour(page):
    call = "[...pca.principalColors([given.vectors], 8)[0]]"
    colours = in_page(page, call, vectors=np.ones((5, 8)))

    assert colours == [0, 0, 0, 255] * 5


def test_cosines_are_those_of_numpy(page):
    vectors = np.random.default_rng(0).standard_normal((60, 20)).astype("f4")
    vectors[7] = 0

    call = "[...vectors.cosinesTo(5, vectors.unitVectors(given.vectors, 20), 20)]"
    cosines = in_page(page, call, vectors=vectors)

    lengths = np.linalg.norm(vectors, axis=1).clip(1e-12)
    expected = vectors @ vectors[5] / lengths / lengths[5]
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def read(page, data):
    encoded = base64.b64encode(data).decode()
    return in_page(
        page,
        f"""(() => {{
            const bytes = Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0)).buffer;
            const {{ metadata, tensors }} = readSafetensors(bytes);
            return [metadata, Object.entries(tensors).map(
                ([name, {{ shape, values }}]) => [name, shape, [...values].map(String)])];
        }})()""",
    )


def test_every_float16_is_read_exactly(page):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)

    _, [[name, shape, values]] = read(page, save({"features.0": halves}))

    assert (name, shape) == ("features.0", [65536])
    np.testing.assert_array_equal(np.array(values, dtype="f4"), halves.astype("f4"))


def test_metadata_and_several_tensors_are_read(page):
    tensors = {"a": np.ones((2, 1), "f2"), "b": np.array([[0.1, -2]], "f4")}

    metadata, read_tensors = read(page, save(tensors, {"model": "demo"}))

    assert metadata == {"model": "demo"}
    assert sorted(entry[:2] for entry in read_tensors) == [["a", [2, 1]], ["b", [1, 2]]]


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 64])
def test_bytes_that_are_no_safetensors_are_refused(page, data):
    encoded = base64.b64encode(data).decode()
    message = in_page(
        page,
        f"""(() => {{
            try {{
                readSafetensors(Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0)).buffer);
            }} catch (error) {{ return error.message; }}
        }})()""",
    )

    assert message == f"the answer's {len(data)} bytes are not safetensors"
