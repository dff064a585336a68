"""A device that cannot be used is an error that says why, never silent work on the CPU."""

import pytest
import torch

from backbone import devices
from backbone.devices import find_devices
from backbone.errors import DeviceError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with GPUs as the test says, whatever this one has."""

    def pretend(*capabilities, node=True, driver="", cuda="13.2", built_for=("sm_75", "sm_90")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (tmp_path / "nvidiactl").touch() if node else None
        monkeypatch.setattr(devices, "DEVICE_NODE", tmp_path / "nvidiactl")
        (tmp_path / "version").write_text(driver)
        monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*built_for, "compute_120"])
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return pretend


def test_auto_is_every_gpu_or_the_cpu_of_a_machine_without(machine):
    machine(node=False)
    assert find_devices("auto") == ["cpu"]
    machine((9, 0), (9, 0))
    assert find_devices("auto") == ["cuda:0", "cuda:1"]


def test_devices_that_are_there_are_taken_as_named(machine):
    machine((9, 0), (9, 0))

    assert find_devices("cuda") == ["cuda"]
    assert find_devices("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    assert find_devices("cpu") == ["cpu"]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_an_old_driver_hides_is_an_error_with_both_versions(machine, wanted):
    machine(driver="NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")

    with pytest.raises(DeviceError, match=r"driver 535\.104\.05 found, 580\.65\.06 or newer"):
        find_devices(wanted)


def test_a_driver_that_is_new_enough_is_not_blamed(machine):
    machine(driver="NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.105.08  Oct 2025\n")

    with pytest.raises(DeviceError, match=r"although driver 580\.105\.08 is new enough"):
        find_devices("auto")


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_on_purpose_are_none(machine, monkeypatch, hidden):
    machine(driver="580.105.08")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    assert find_devices("auto") == ["cpu"]
    with pytest.raises(DeviceError, match="cuda is not here: 0 CUDA devices"):
        find_devices("cuda")


def test_a_build_without_cuda_on_a_machine_with_a_gpu_says_so(machine):
    machine(cuda=None)

    with pytest.raises(DeviceError, match="built without CUDA"):
        find_devices("auto")


def test_a_driver_that_does_not_say_its_version_is_still_an_error(machine):
    machine(driver="")

    with pytest.raises(DeviceError, match="driver of unknown version found"):
        find_devices("auto")


def test_the_cpu_can_be_had_beside_a_gpu_that_cannot_be_used(machine):
    machine(driver="535.104.05")

    assert find_devices("cpu") == ["cpu"]


def test_a_gpu_older_than_the_build_is_refused(machine):
    machine((7, 0))

    with pytest.raises(DeviceError, match=r"capability 7\.0.*built for 7\.5 and above"):
        find_devices("auto")


def test_capabilities_of_two_digits_are_newer(machine):
    machine((12, 0), built_for=("sm_90", "sm_120a", "sm_100"))

    assert find_devices("auto") == ["cuda:0"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda:1", "cuda:1 is not here: 1 CUDA devices"),
        ("cuda:0,cuda:7", "cuda:7 is not here"),
        ("mps", "mps is not supported"),
        ("gpu", "no device is called 'gpu'"),
    ],
)
def test_a_device_that_is_not_here_is_refused_by_name(machine, wanted, message):
    machine((9, 0))

    with pytest.raises(DeviceError, match=message):
        find_devices(wanted)
