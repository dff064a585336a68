"""Safetensors as views, and frames in pieces."""

import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

from service.client import AnswerError
from service.client.tensors import FrameReader, parse_safetensors


def parsed(tensors, metadata=None):
    return parse_safetensors(bytearray(safetensors.torch.save(tensors, metadata)))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.uint8]
)
def test_every_dtype_arrives_as_it_was(dtype):
    tensor = (torch.randn(2, 3, 5) * 10).abs().to(dtype)

    tensors, metadata = parsed({"x": tensor}, {"key": "value"})

    assert metadata == {"key": "value"}
    assert tensors["x"].as_torch().dtype == dtype
    assert torch.equal(tensors["x"].as_torch(), tensor)
    array = tensors["x"].as_numpy()
    assert array.dtype == (
        np.float32
        if dtype == torch.bfloat16
        else tensor.float().numpy().astype(str(dtype).removeprefix("torch.")).dtype
    )
    assert (array == tensor.float().numpy()).all()


def test_tensors_are_views_that_may_be_written_to():
    data = bytearray(safetensors.torch.save({"x": torch.zeros(4)}))
    tensors, _ = parse_safetensors(data)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors["x"].as_torch()[0] = 1.0

    assert tensors["x"].as_numpy()[0] == 1.0
    assert bytes(data[-16:-12]) == np.float32(1.0).tobytes()


def test_a_tensor_at_an_odd_address_is_right():
    body = torch.arange(3, dtype=torch.int8).numpy().tobytes()
    body += torch.arange(4, dtype=torch.float32).numpy().tobytes()
    header = b'{"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},'
    header += b'"b":{"dtype":"F32","shape":[4],"data_offsets":[3,19]}}'
    data = bytearray(len(header).to_bytes(8, "little") + header + body)

    tensors, _ = parse_safetensors(data)

    assert tensors["b"].as_torch().tolist() == [0, 1, 2, 3]
    assert tensors["b"].as_torch().data_ptr() % 4 == 0
    assert tensors["b"].as_numpy().tolist() == [0, 1, 2, 3]


def test_a_tensor_without_elements_has_its_shape():
    tensors, _ = parsed({"x": torch.zeros(0, 4)})

    assert tensors["x"].as_torch().shape == (0, 4)
    assert tensors["x"].as_numpy().shape == (0, 4)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [1]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_do_not_fit_their_bytes_are_refused(header):
    data = bytearray(len(header).to_bytes(8, "little") + header + bytes(4))

    with pytest.raises(AnswerError, match="no safetensors"):
        parse_safetensors(data)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 20, b"\x09" + bytes(7) + b"{}"])
def test_bytes_that_end_early_are_refused(data):
    with pytest.raises(AnswerError, match="no safetensors"):
        parse_safetensors(bytearray(data))


def stream_of(frames):
    prefixed = [len(frame).to_bytes(8, "little") + frame for frame in frames]
    return b"".join(prefixed) + bytes(8)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 11, 64, 1000])
def test_frames_are_the_same_in_whatever_pieces_they_come(size):
    frames = [b"a", b"bc" * 10, b"\x00" * 33]
    stream = stream_of(frames)
    reader = FrameReader()

    found = []
    for start in range(0, len(stream), size):
        assert not reader.is_complete
        found += reader.feed(stream[start : start + size])

    assert found == frames
    assert reader.is_complete


def test_a_frame_is_there_as_soon_as_its_last_byte():
    reader = FrameReader()
    stream = stream_of([b"abc", b"de"])

    assert list(reader.feed(stream[:10])) == []
    assert list(reader.feed(stream[10:11])) == [b"abc"]


def test_bytes_after_the_last_frame_are_refused():
    with pytest.raises(AnswerError, match="follow"):
        list(FrameReader().feed(stream_of([b"a"]) + b"x"))


def test_a_length_that_cannot_be_is_refused():
    with pytest.raises(AnswerError, match="frame of"):
        list(FrameReader().feed(b"\xff" * 8))
