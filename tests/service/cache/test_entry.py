import json
import struct
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cache import CorruptEntryError, Entry
from service.cache.entry import CHECKSUM_BYTES, FORMAT, _checksum, dump, load

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PREFIX_BYTES = len(FORMAT) + CHECKSUM_BYTES

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
entries = st.builds(
    Entry,
    st.dictionaries(texts.filter(lambda name: name != "__metadata__"), tensors, max_size=4),
    st.dictionaries(texts, texts, max_size=4),
)


def small_entry():
    return Entry(
        {"features": torch.arange(6.0).reshape(2, 3), "cls": torch.ones(3, dtype=torch.bfloat16)},
        {"grid": "[1, 2]"},
    )


def sealed(body, key="k"):
    """Bytes with a right checksum over any body."""
    return FORMAT + _checksum(key, [body]) + body


@settings(deadline=None)
@given(entry=entries, key=texts)
def test_what_is_dumped_is_loaded_bit_for_bit(entry, key):
    loaded = load(dump(entry, key), key)

    assert loaded.metadata == entry.metadata
    assert list(loaded.tensors) == list(entry.tensors)
    for name, tensor in entry.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_anywhere_gives_an_entry(mask):
    data = dump(small_entry(), "key")

    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= mask
        with pytest.raises(CorruptEntryError):
            load(bytes(damaged), "key")


def test_no_part_of_it_gives_an_entry():
    data = dump(small_entry(), "key")

    for length in range(len(data)):
        with pytest.raises(CorruptEntryError):
            load(data[:length], "key")


@pytest.mark.parametrize("tail", [b"\0", b" ", b"more"])
def test_bytes_behind_it_are_refused(tail):
    with pytest.raises(CorruptEntryError):
        load(dump(small_entry(), "key") + tail, "key")


def test_a_value_under_a_wrong_key_is_refused():
    data = dump(small_entry(), "key")

    with pytest.raises(CorruptEntryError, match="checksum"):
        load(data, "other")


def test_key_and_value_cannot_be_divided_otherwise():
    data = dump(small_entry(), "key")
    body = data[PREFIX_BYTES:]

    assert _checksum("key", [body]) != _checksum("ke", [b"y" + body])


def test_another_version_is_refused_by_name():
    data = bytearray(dump(small_entry(), "key"))
    data[len(FORMAT) - 1] += 1

    with pytest.raises(CorruptEntryError, match="version"):
        load(data, "key")


def test_behind_the_checksum_lies_a_safetensors_file():
    entry = small_entry()

    read = safetensors.torch.load(dump(entry, "key")[PREFIX_BYTES:])

    assert set(read) == {"features", "cls"}
    assert all(torch.equal(read[name], entry.tensors[name]) for name in read)


@pytest.mark.parametrize(
    "header",
    [
        [],
        1,
        {},
        {"__metadata__": []},
        {"__metadata__": {"a": 1}},
        {"__metadata__": {}, "t": 1},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"__metadata__": {}, "t": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}},
        {"__metadata__": {}, "t": {"dtype": "F32", "shape": [2], "data_offsets": [2**70, 2**70]}},
    ],
)
def test_a_right_checksum_over_nonsense_is_refused(header):
    text = json.dumps(header).encode()

    with pytest.raises(CorruptEntryError, match="another program"):
        load(sealed(struct.pack("<Q", len(text)) + text + bytes(8)), "k")


@pytest.mark.parametrize("body", [b"", b"\0" * 7, struct.pack("<Q", 2**63), bytes(64)])
def test_a_right_checksum_over_no_header_is_refused(body):
    with pytest.raises(CorruptEntryError, match="another program"):
        load(sealed(body), "k")


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_loading_warns_of_nothing(kind):
    data = kind(dump(small_entry(), "key"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(data, "key")


def test_tensors_are_views_on_a_bytearray():
    data = bytearray(dump(small_entry(), "key"))

    loaded = load(data, "key")
    data[-1] ^= 0x40  # of the narrower tensor, which lies last

    assert not torch.equal(loaded.tensors["cls"], small_entry().tensors["cls"])


def test_every_tensor_is_aligned_to_its_elements():
    odd = {
        "a": torch.ones(3, dtype=torch.float16),
        "b": torch.ones(3),
        "c": torch.ones(1, dtype=torch.bfloat16),
        "d": torch.ones(1),
    }

    loaded = load(dump(Entry(odd, {}), "key"), "key")

    assert all(t.data_ptr() % t.element_size() == 0 for t in loaded.tensors.values())


def test_tensors_of_inference_mode_and_with_strides_are_dumped():
    with torch.inference_mode():
        features = torch.arange(12.0).reshape(3, 4).T

    loaded = load(dump(Entry({"features": features}, {}), "key"), "key")

    assert torch.equal(loaded.tensors["features"], features)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, dtype=torch.int64), torch.zeros(1, device="meta")]
)
def test_an_entry_takes_float_tensors_on_the_cpu_only(tensor):
    with pytest.raises(ValueError, match="the cache takes float32"):
        Entry({"features": tensor}, {})


@pytest.mark.parametrize("metadata", [{"\ud800": "x"}, {"x": "\ud800"}])
def test_an_entry_refuses_text_that_cannot_be_written(metadata):
    with pytest.raises(ValueError, match="surrogates"):
        Entry({}, metadata)


def test_bytes_of_an_entry_are_those_of_tensors_and_texts():
    assert Entry({"ab": torch.zeros(5)}, {"c": "def"}).num_bytes == 20 + 2 + 4


def test_an_entry_lets_go_of_the_batch_that_it_was_cut_from():
    batch = torch.randn(8, 3)
    whole = torch.randn(3)

    entry = Entry({"part": batch[2], "whole": whole}, {}).owning()

    assert torch.equal(entry.tensors["part"], batch[2])
    assert entry.tensors["part"].untyped_storage().nbytes() == 12
    assert entry.tensors["whole"] is whole


def test_a_loaded_entry_is_not_copied_again():
    loaded = load(dump(small_entry(), "key"), "key")

    assert loaded.owning() is loaded
