"""Nothing is timed when the service, or a peer, answers something else than the bare model."""

import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from backbone import open_model
from benchmarks.serving.bare import bare, check_parity, check_peer, decode, encode, pipelined
from benchmarks.serving.fatal_encoder import fail_when
from benchmarks.serving.peers_fastapi import create_app
from tests.benchmarks.fake_server import fake_server, good
from tests.support import tiny_artifact

SIZE = (32, 48)
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_model(tiny_artifact(tmp_path_factory.mktemp("model") / "tiny"), precision="fp32")


@pytest.fixture(scope="module")
def photograph():
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(noise.to(torch.uint8).numpy()).save(file, "JPEG")
    return file.getvalue()


def served(encoder, *, wrong=0.0):
    """The answers of a service that is off by `wrong`, relative to each vector."""

    def answer(request):
        tokens_NC = encode(encoder, [decode(request.body, SIZE)])[0] * (1 + wrong)
        dtype = request.head.split("dtype=")[1].split("&")[0]
        if dtype == "int8":
            scale_N1 = tokens_NC.abs().amax(dim=-1, keepdim=True) / 127
            rounded = (tokens_NC / scale_N1).round().to(torch.int8)
            tensors = {"features.0": rounded, "features.0.scale": scale_N1[:, 0].contiguous()}
        else:
            tensors = {"features.0": tokens_NC.to(getattr(torch, dtype))}
        return 0.0, good(save(tensors))

    return answer


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_same_features_pass_in_every_dtype(encoder, photograph, dtype):
    with fake_server(served(encoder)) as server:
        found = check_parity(
            f"http://127.0.0.1:{server.port}",
            encoder,
            [photograph],
            SIZE,
            dtypes=[dtype],
            tolerance=TOLERANCE,
        )

    assert len(found) == 8  # kinds of images
    assert max(difference.relative_error for difference in found) <= found[0].bound
    assert min(difference.min_cosine for difference in found) > 0.999


@pytest.mark.parametrize(("dtype", "wrong"), [("float32", 2e-3), ("float16", 4e-3), ("int8", 0.2)])
def test_other_features_stop_the_run(encoder, photograph, dtype, wrong):
    with (
        fake_server(served(encoder, wrong=wrong)) as server,
        pytest.raises(SystemExit, match=f"in {dtype} differ by .* nothing is timed"),
    ):
        check_parity(
            f"http://127.0.0.1:{server.port}",
            encoder,
            [photograph],
            SIZE,
            dtypes=[dtype],
            tolerance=TOLERANCE,
        )


def test_features_that_are_not_numbers_stop_the_run(encoder, photograph):
    with fake_server(served(encoder, wrong=float("nan"))) as server, pytest.raises(SystemExit):
        check_parity(
            f"http://127.0.0.1:{server.port}",
            encoder,
            [photograph],
            SIZE,
            dtypes=["float32"],
            tolerance=TOLERANCE,
        )


def test_a_peer_that_does_other_work_stops_the_run(encoder, photograph):
    tokens = encode(encoder, [decode(photograph, SIZE)])[0].half()
    same, other = tokens.numpy().tobytes(), (tokens * 1.01).numpy().tobytes()

    with fake_server(lambda _: (0.0, good(same))) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert check_peer(url, encoder, [photograph], SIZE, tolerance=TOLERANCE) < TOLERANCE
        server.answer = lambda _: (0.0, good(other))
        with pytest.raises(SystemExit, match="differs from the bare model"):
            check_peer(url, encoder, [photograph], SIZE, tolerance=TOLERANCE)
        server.answer = lambda _: (0.0, good(same[:-2]))
        with pytest.raises(SystemExit, match="answers 191 values, not 192"):
            check_peer(url, encoder, [photograph], SIZE, tolerance=TOLERANCE)


def test_the_plain_fastapi_peer_answers_the_bare_features_in_float16(encoder, photograph):
    from starlette.testclient import TestClient

    with TestClient(create_app(encoder, SIZE)) as client:
        answer = client.post("/features", content=photograph)

    expected = encode(encoder, [decode(photograph, SIZE)])[0].half()
    assert answer.content == expected.numpy().tobytes()


@pytest.mark.parametrize("loop", [bare, pipelined])
def test_the_loops_encode_every_image_once_in_batches(encoder, photograph, loop, monkeypatch):
    batches = []
    monkeypatch.setattr(
        "benchmarks.serving.bare.encode", lambda _, images: batches.append(len(images))
    )

    loop(encoder, [photograph] * 10, SIZE, 4)

    assert batches == [4, 4, 2]


def test_the_planted_error_comes_with_its_file_and_stays(encoder, tmp_path, monkeypatch):
    from backbone import DenseEncoder

    monkeypatch.setattr(DenseEncoder, "encode", DenseEncoder.encode)  # to be put back
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    fail_when(tmp_path / "fatal")
    encoder.encode(image)
    (tmp_path / "fatal").touch()

    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error"):
            encoder.encode(image)
