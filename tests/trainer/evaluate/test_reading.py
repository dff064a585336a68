import threading

import pytest
import torch

from trainer.evaluate.reading import LazyTensors, read_ahead


def test_what_is_read_ahead_comes_in_order_and_is_never_all_of_it():
    read, lock = [], threading.Lock()

    def square(number):
        with lock:
            read.append(number)
        return number**2

    found = read_ahead(range(100), square, count=3)

    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(read) <= 5 + 3
    assert list(found) == [number**2 for number in range(5, 100)]


def test_an_error_is_raised_where_its_item_would_have_come():
    found = read_ahead([1, 2, 0, 3], lambda number: 6 // number)

    assert [next(found), next(found)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_walk_that_is_left_early_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in LazyTensors(100, lambda index: torch.tensor(index)):
        break

    assert threading.active_count() == before


def test_lazy_tensors_are_read_when_asked_for_and_walked_in_order():
    read = []

    def tensor(index):
        read.append(index)
        return torch.tensor(index)

    tensors = LazyTensors(7, tensor)

    assert len(tensors) == 7
    assert read == []
    assert (int(tensors[2]), int(tensors[-1])) == (2, 6)
    assert [int(each) for each in tensors[1:6:2]] == [1, 3, 5]
    assert read == [2, 6, 1, 3, 5]
    assert [int(each) for each in tensors] == list(range(7))
    with pytest.raises(IndexError, match="index 7 of 7"):
        tensors[7]
