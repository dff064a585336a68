from service.cores import Cores


def test_work_that_is_alone_gets_all_threads_and_more_at_a_time_share_them():
    cores = Cores(8)

    assert [cores.enter() for _ in range(5)] == [8, 4, 2, 2, 1]

    for _ in range(4):
        cores.leave()
    assert (cores.num_busy, cores.enter()) == (1, 4)


def test_there_is_always_one_thread():
    cores = Cores(1)

    assert [cores.enter() for _ in range(3)] == [1, 1, 1]
