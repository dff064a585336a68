import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse, ResponseError

from service.cache.replies import read_values

values = st.lists(st.none() | st.binary(max_size=300) | st.just(b"\r\n$-1\r\n"), max_size=6)


class Pieces:
    """A connection from which an answer comes in pieces of the sizes given, again and again."""

    def __init__(self, answer, sizes):
        self.stream = self
        self._answer = answer
        self._sizes = sizes
        self._num_reads = 0

    def recv(self, num_bytes):
        size = self._sizes[self._num_reads % len(self._sizes)]
        self._num_reads += 1
        piece = self._answer[: min(size, num_bytes)]
        self._answer = self._answer[len(piece) :]
        return piece

    def recv_into(self, buffer):
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def answer_with(values):
    strings = (b"$-1\r\n" if v is None else b"$%d\r\n%b\r\n" % (len(v), v) for v in values)
    return b"*%d\r\n" % len(values) + b"".join(strings)


@settings(deadline=None)
@given(values=values, sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_an_answer_reads_the_same_in_whatever_pieces_it_comes(values, sizes):
    read = read_values(Pieces(answer_with(values), sizes), len(values))

    assert [None if value is None else bytes(value) for value in read] == values


@settings(deadline=None)
@given(values=values, sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8), data=st.data())
def test_an_answer_that_ends_early_is_an_error(values, sizes, data):
    answer = answer_with(values)
    length = data.draw(st.integers(0, len(answer) - 1))

    with pytest.raises(Exception, match="closed the connection"):
        read_values(Pieces(answer[:length], sizes), len(values))


def test_values_can_be_written_to_as_tensors_need():
    (value,) = read_values(Pieces(answer_with([b"abc"]), [100]), 1)

    assert not value.readonly


def test_a_refusal_says_what_redis_said():
    with pytest.raises(ResponseError, match="LOADING the data"):
        read_values(Pieces(b"-LOADING the data\r\n", [100]), 1)


def test_an_answer_to_another_question_is_refused():
    with pytest.raises(InvalidResponse, match="MGET of 2 keys was answered with 3 values"):
        read_values(Pieces(answer_with([None] * 3), [100]), 2)


def test_more_than_the_answer_is_refused():
    with pytest.raises(InvalidResponse, match="more than the answer"):
        read_values(Pieces(answer_with([None]) + b"+OK\r\n", [100]), 1)
