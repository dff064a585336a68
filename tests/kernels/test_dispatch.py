"""Which of kernel and reference an operation runs."""

import logging

import pytest
import torch

from kernels import dispatch

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No decision taken and none logged yet, and no interpreter unless a test says so."""
    dispatch.mode.cache_clear()
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv(dispatch.MODE_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch.triton.knobs.runtime, "interpret", False)
    yield
    dispatch.mode.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A tensor that says it is on a GPU of this compute capability."""

    def tensor(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        return torch.empty(1, device="meta").as_subclass(_OnCuda)

    return tensor


class _OnCuda(torch.Tensor):
    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.mark.parametrize(("asked", "wanted"), [("auto", False), ("reference", False)])
def test_a_cpu_tensor_takes_the_reference(monkeypatch, asked, wanted):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, asked)

    assert dispatch.use_triton("op", CPU) is wanted


@pytest.mark.parametrize(
    ("asked", "wanted"), [("auto", True), ("triton", True), ("reference", False)]
)
def test_a_hopper_tensor_takes_the_kernel_unless_told_otherwise(monkeypatch, hopper, asked, wanted):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, asked)

    assert dispatch.use_triton("op", hopper()) is wanted


def test_an_old_gpu_takes_the_reference(hopper):
    assert dispatch.use_triton("op", hopper((7, 5))) is False


def test_what_the_kernel_cannot_do_takes_the_reference(hopper):
    assert dispatch.use_triton("op", hopper(), unsupported="float64") is False


@pytest.mark.parametrize("reason", ["device", "dtype"])
def test_an_explicit_choice_never_falls_back(monkeypatch, hopper, reason):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "triton")
    tensor, unsupported = (CPU, None) if reason == "device" else (hopper(), "float64 tensors")
    words = "not on a CUDA device" if reason == "device" else "float64 tensors"

    with pytest.raises(dispatch.KernelUnavailableError, match=words):
        dispatch.use_triton("op", tensor, unsupported=unsupported)


def test_the_interpreter_serves_cpu_tensors_when_kernels_are_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch.triton.knobs.runtime, "interpret", True)
    assert dispatch.use_triton("op", CPU) is False

    dispatch.mode.cache_clear()
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "triton")
    assert dispatch.use_triton("op", CPU) is True


def test_each_decision_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        for operation in ("a", "a", "b"):
            dispatch.use_triton(operation, CPU)

    assert [record.getMessage()[:26] for record in caplog.records] == [
        "a runs on its PyTorch refe",
        "b runs on its PyTorch refe",
    ]


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "cuda")

    with pytest.raises(
        dispatch.KernelModeError, match="'cuda'; use one of auto, triton, reference"
    ):
        dispatch.mode()


def test_the_reference_where_it_is_faster_unless_the_kernel_is_asked_for(monkeypatch, hopper):
    assert dispatch.use_triton("op", hopper(), slower="the table says so") is False

    dispatch.mode.cache_clear()
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "triton")
    assert dispatch.use_triton("op", hopper(), slower="the table says so") is True


def test_a_kernel_that_cannot_run_on_a_gpu_is_a_warning(caplog, hopper):
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        dispatch.use_triton("op", hopper(), unsupported="float64 tensors")

    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_kernels_that_cannot_run_are_told_before_the_work(monkeypatch):
    dispatch.check_mode(CPU.device)

    dispatch.mode.cache_clear()
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "triton")
    with pytest.raises(dispatch.KernelUnavailableError, match="no kernel can run: the tensors are"):
        dispatch.check_mode(CPU.device)
