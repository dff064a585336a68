import hashlib
import io
import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from service.errors import MalformedPixelsError, TooManyImagesError
from service.pixels import Pixels, read_npy, read_safetensors


def batch(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


IMAGES = batch(2, 4, 5, 3)


def npy(array, version=None, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, **options)
    return file.getvalue()


def npy_of(shape, descr="'|u1'", data=b"", version=1):
    """An npy file with a header written by hand."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def tensors_of(header, data=b""):
    """A safetensors file with a header written by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(1, 1, 3), offsets=(0, 3), dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_images(found, expected):
    assert len(found) == len(expected)
    for pixels, image in zip(found, expected, strict=True):
        np.testing.assert_array_equal(pixels.rgb_HW3, image)
        assert pixels.rgb_HW3.dtype == np.uint8


# --- what is read


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_npy_file_of_every_version_is_a_batch_of_images(version):
    assert_images(read_npy(npy(IMAGES, version)), IMAGES)


def test_a_safetensors_file_is_a_batch_of_images():
    assert_images(read_safetensors(save({"images": IMAGES})), IMAGES)


def test_the_texts_of_a_safetensors_file_do_not_matter():
    body = save({"images": IMAGES}, metadata={"made by": "camera 1"})

    assert_images(read_safetensors(body), IMAGES)


def test_an_array_of_three_axes_is_one_image():
    image = IMAGES[0]

    assert_images(read_npy(npy(image)), [image])
    assert_images(read_safetensors(save({"images": image})), [image])


@pytest.mark.parametrize(
    ("read", "body"), [(read_npy, npy(IMAGES))] + [(read_safetensors, save({"images": IMAGES}))]
)
def test_images_are_views_of_the_body(read, body):
    for pixels in read(body):
        owner = pixels.rgb_HW3
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert owner is body


def test_a_digest_is_that_of_shape_and_pixels():
    wide, high = Pixels(batch(2, 6, 3)), Pixels(batch(2, 6, 3).reshape(3, 4, 3))
    expected = hashlib.sha256(b"pixels (2, 6, 3)\n" + wide.rgb_HW3.tobytes()).digest()

    assert wide.digest == expected
    assert high.digest != wide.digest
    assert Pixels(batch(2, 6, 3, seed=1)).digest != wide.digest


def test_the_same_pixels_have_one_digest_however_they_came():
    from_npy, from_tensors = read_npy(npy(IMAGES)), read_safetensors(save({"images": IMAGES}))

    assert [image.digest for image in from_npy] == [image.digest for image in from_tensors]


# --- what is no batch of images


@pytest.mark.parametrize("write", [npy, lambda array: save({"images": array})])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32), r"\[2, 4, 5, 3\]; send one uint8 array"),
        (IMAGES.astype(np.int8), "the array is"),
        (IMAGES.astype(bool), "the array is"),
        (batch(4, 5), r"uint8 \[4, 5\]"),
        (batch(4, 5, 1), r"uint8 \[4, 5, 1\]"),
        (batch(4, 5, 4), r"uint8 \[4, 5, 4\]"),
        (batch(2, 3, 4, 5), r"uint8 \[2, 3, 4, 5\]"),
        (batch(1, 1, 4, 5, 3), r"uint8 \[1, 1, 4, 5, 3\]"),
        (np.array(3, np.uint8), r"uint8 \[\]"),
        (batch(0, 4, 5, 3), r"\[0, 4, 5, 3\] is empty"),
        (batch(2, 0, 5, 3), "is empty"),
        (batch(1, 1, 1, 1, 1, 1, 1, 1), r"uint8 \[1, 1, 1, 1, 1, 1\]"),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if hasattr(value, "dtype") else "",
)
def test_another_array_is_refused_with_what_came_and_what_is_wanted(write, array, message):
    read = read_npy if write is npy else read_safetensors

    with pytest.raises(MalformedPixelsError, match=message):
        read(write(array))


def test_fortran_order_is_refused_with_what_to_do():
    with pytest.raises(MalformedPixelsError, match="send np.ascontiguousarray"):
        read_npy(npy(np.asfortranarray(IMAGES)))


class Bomb:
    """Tells when it is unpickled."""

    num_unpickled = 0

    def __reduce__(self):
        return _explode, ()


def _explode():
    Bomb.num_unpickled += 1


def test_objects_are_never_unpickled():
    body = npy(np.array([[[Bomb()] * 3]], dtype=object), allow_pickle=True)
    np.load(io.BytesIO(body), allow_pickle=True)
    assert Bomb.num_unpickled > 0, "the body would explode"
    Bomb.num_unpickled = 0

    with pytest.raises(MalformedPixelsError, match=r"the array is object \[1, 1, 3\]"):
        read_npy(body)

    assert Bomb.num_unpickled == 0


@pytest.mark.parametrize("descr", ["[('r', '|u1')]", "('|u1', (3,))", "'|V3'", "'<U9'", "'>u2'"])
def test_other_element_types_are_refused(descr):
    with pytest.raises(MalformedPixelsError):
        read_npy(npy_of((1, 1, 3), descr, b"abc"))


@pytest.mark.parametrize(
    ("read", "body"), [(read_npy, npy(IMAGES)), (read_safetensors, save({"images": IMAGES}))]
)
def test_a_body_that_is_cut_off_anywhere_is_refused(read, body):
    for length in range(len(body)):
        with pytest.raises(MalformedPixelsError):
            read(body[:length])


@pytest.mark.parametrize(
    ("read", "body"), [(read_npy, npy(IMAGES)), (read_safetensors, save({"images": IMAGES}))]
)
def test_bytes_after_the_pixels_are_refused(read, body):
    with pytest.raises(MalformedPixelsError, match="send the whole file with nothing"):
        read(body + b"\0")


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_npy, save({"images": IMAGES})),
        (read_safetensors, npy(IMAGES)),
        (read_npy, b""),
        (read_safetensors, b""),
        (read_npy, npy_of((1, 1, 3), data=b"abc", version=4)),
        (read_npy, npy_of((1, 1, -3), data=b"abc")),
        (read_npy, npy_of((-1, -1, 3), data=b"abc")),
        (read_npy, npy_of("'113'", data=b"abc")),
        (read_npy, npy_of((1.0, 1, 3), data=b"abc")),
    ],
)
def test_what_is_no_file_of_the_kind_is_refused(read, body):
    with pytest.raises(MalformedPixelsError):
        read(body)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, r"has the tensors \[\]; send one, named 'images'"),
        ({"image": entry()}, r"has the tensors \['image'\]"),
        ({"images": entry(), "more": entry()}, r"\['images', 'more'\]; send one"),
        ({"a": entry(), "b": entry()}, r"\['a', 'b'\]"),
        ([1], "no JSON object"),
        (b"{" * 9, "no JSON object"),
        (b'{"images": NaN}', "no JSON object"),
        (b"\xff\xff\xff", "no JSON object"),
        ({"images": 3}, "does not describe"),
        ({"images": {}}, "does not describe"),
        ({"images": entry(shape=None)}, "a list of whole numbers is wanted"),
        ({"images": entry(shape="113")}, "a list of whole numbers"),
        ({"images": entry(shape=["1", 1, 3])}, "a list of whole numbers"),
        ({"images": entry(shape=[1.0, 1, 3])}, "a list of whole numbers"),
        ({"images": entry(shape=[True, 1, 3])}, "a list of whole numbers"),
        ({"images": entry(shape=[10**30, 1, 3])}, "a list of whole numbers"),
        ({"images": entry(shape=["9" * 4000, "9" * 4000, "9" * 4000, 3])}, "whole numbers"),
        ({"images": entry(offsets={"0": 3})}, "a list of whole numbers"),
        ({"images": entry(dtype=["U8"])}, "the array is"),
        ({"images": entry(dtype="F32")}, "the array is F32"),
        ({"images": entry(shape=[-1, -1, 3])}, "is empty"),
        ({"images": entry(shape=[1, 2, 3])}, r"3 bytes for an array \[1, 2, 3\]"),
    ],
)
def test_a_safetensors_header_that_describes_no_images_is_refused(header, message):
    with pytest.raises(MalformedPixelsError, match=message):
        read_safetensors(tensors_of(header, b"abc"))


@pytest.mark.parametrize(
    "offsets",
    [[], [0], [0, 3, 3], [0, 2], [1, 3], [0, 4], [3, 0], [-3, 0], [-3, 3], [3, 6], [0, 2**63]],
)
def test_pixels_lie_where_the_file_has_nothing_else(offsets):
    with pytest.raises(MalformedPixelsError, match="nothing else in it"):
        read_safetensors(tensors_of({"images": entry(offsets=offsets)}, b"abc"))


@pytest.mark.parametrize("length", [0, 1, 4, 65537, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused(length):
    with pytest.raises(MalformedPixelsError, match="2 to 65536 are allowed"):
        read_safetensors(length.to_bytes(8, "little") + b"{}")


# --- what a hostile body costs


HUGE = [
    "(999999999, 999999999, 3)",
    f"({10**18}, {10**18}, {10**18}, 3)",
    f"({'9' * 3000}, {'9' * 3000}, 3)",
    f"(0x{'f' * 9000}, 2, 3)",
    f"(-0x{'f' * 9000}, 2, 3)",
]


@pytest.mark.parametrize(
    ("read", "body"),
    [
        *[(read_npy, npy_of(shape, data=b"abc")) for shape in HUGE],
        (read_npy, npy_of((1, 1, 3), f"'|V{2**30}'", b"abc")),
        (read_safetensors, tensors_of({"images": entry([2**62, 2**62, 3])}, b"abc")),
        (read_safetensors, tensors_of({"images": entry([2**62] * 3000)}, b"abc")),
        (read_safetensors, tensors_of({"n" * 60_000: entry()}, b"abc")),
        (read_safetensors, tensors_of(b"[" * 60_000, b"abc")),
        (read_npy, npy_of("(" * 9000)),
        (read_npy, npy_of("-" * 9000 + "1")),
        (read_npy, npy_of("1" + "+1" * 4000)),
        (read_npy, npy_of("9" * 9000)),
        (read_npy, npy_of((1, 1, 3), "'" + "x" * 9000 + "'")),
        (read_npy, npy_of((1,) * 3000)),
        (read_npy, npy_of((1, 1, 3), "[('f', '|u1'), " * 100 + "]" * 100)),
    ],
    ids=lambda value: "" if callable(value) else str(len(value)),
)
def test_what_a_header_claims_costs_nothing_and_is_not_repeated_as_a_whole(read, body):
    tracemalloc.start()
    started = time.thread_time()

    with pytest.raises(MalformedPixelsError) as caught:
        read(body)

    seconds = time.thread_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(caught.value.message) < 500
    assert peak < 64 * 1024 * 1024
    assert seconds < 2.0  # a tenth here without tracing


@pytest.mark.parametrize("write", [npy, lambda array: save({"images": array})])
def test_more_images_than_allowed_are_refused_before_they_are_made(write):
    read = read_npy if write is npy else read_safetensors
    body = write(np.zeros((1_000_000, 1, 1, 3), np.uint8))
    started = time.thread_time()

    with pytest.raises(TooManyImagesError, match="1000000 images, 32 are allowed"):
        read(body, max_images=32)

    assert time.thread_time() - started < 0.1  # making them takes two seconds
    assert len(read(write(IMAGES), max_images=2)) == 2


# --- any bytes at all


def check_reads_or_refuses(read, body):
    try:
        images = read(body)
    except MalformedPixelsError:
        return
    assert images
    num_bytes = sum(image.rgb_HW3.size for image in images)
    assert body.endswith(b"".join(image.rgb_HW3.tobytes() for image in images))
    assert 3 <= num_bytes < len(body)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"\x93NUMPY")
@example(b"\x93NUMPY\x01\x00\xff\xff")
def test_any_bytes_are_images_or_refused(body):
    check_reads_or_refuses(read_npy, body)
    check_reads_or_refuses(read_npy, b"\x93NUMPY\x01\x00" + body)
    check_reads_or_refuses(read_npy, b"\x93NUMPY\x02\x00" + len(body).to_bytes(4, "little") + body)
    check_reads_or_refuses(read_safetensors, body)
    check_reads_or_refuses(read_safetensors, tensors_of(body))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_images_or_refused(data):
    read, body = data.draw(
        st.sampled_from([(read_npy, npy(IMAGES)), (read_safetensors, save({"images": IMAGES}))])
    )
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        damaged[place] = data.draw(st.integers(0, 255))

    check_reads_or_refuses(read, bytes(damaged))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(shape=json_values, offsets=json_values, dtype=json_values | st.just("U8"))
def test_any_json_in_a_safetensors_header_is_images_or_refused(shape, offsets, dtype):
    check_reads_or_refuses(
        read_safetensors, tensors_of({"images": entry(shape, offsets, dtype)}, b"abcdef")
    )


@settings(deadline=None)
@given(st.lists(st.integers(-3, 5) | st.integers(), max_size=5), st.binary(max_size=90))
def test_any_shape_is_images_or_refused(shape, data):
    check_reads_or_refuses(read_npy, npy_of(tuple(shape), data=data))
    check_reads_or_refuses(
        read_safetensors, tensors_of({"images": entry(shape, [0, len(data)])}, data)
    )
