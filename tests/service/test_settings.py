import pytest

from kernels import dispatch
from service.command_line import KERNELS_VARIABLE, load_settings, parse_arguments
from service.settings import Settings, SettingsError, without_password

CHOSEN = {
    "model": "a=one,two",
    "weights": "w.pt",
    "random_weights": "true",
    "device": "cpu",
    "precision": "fp32",
    "host": "::1",
    "insecure": "1",
    "api_key_file": "keys",
    "cors_origins": "https://a.example,https://b.example",
    "allow_url_hosts": "images.example",
    "url_seconds": "9",
    "max_url_redirects": "9",
    "buckets": "448x448,448x672",
    "only_buckets": "true",
    "cuda_graphs": "off",
    "jpeg_decoder": "nvjpeg",
    "decode_threads": "9",
    "torch_threads": "9",
    "cpu_engines": "9",
    "cache": "redis://localhost:6379/0",
    "cache_password_file": "password",
    "cache_ca_file": "ca.pem",
    "max_held_body_bytes": "99999999",
    "log_level": "error",
    "log_format": "json",
    "otlp_endpoint": "http://localhost:4318",
}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_field_can_be_set_by_its_variable(name):
    value = CHOSEN.get(name, "9999")

    settings = load_settings({} if name == "model" else {"model": "m"}, variable(name, value))

    read = getattr(settings, name)
    shown = ",".join(read) if isinstance(read, tuple) else str(read)
    assert shown in (value, value.capitalize(), "True", f"{value}.0")
    assert read != Settings.model_fields[name].default


def variable(name, value):
    extra = {"REFINERY_BATCH_TOKENS": "16384"} if name == "max_image_tokens" else {}
    return {f"REFINERY_{name.upper()}": value} | extra


def test_models_are_named_by_the_operator_or_by_their_last_part():
    settings = parse_arguments(
        ["--model", "models/demo", "--model", "raw=models/demo-pretrained", "--model", "a/b@c"], {}
    ).settings

    assert settings.models == {
        "demo": "models/demo",
        "raw": "models/demo-pretrained",
        "b-c": "a/b@c",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "a/x", "--model", "b/x"], "two models are called 'x'"),
        (["--model", "a", "--model", "b", "--random-weights"], "go with one --model"),
        (["--model", "a", "--buckets", "448"], "write height x width"),
        (["--model", "a", "--max-queue-tokens", "7"], "less than max_image_tokens 8192"),
        (["--model", "a", "--cache", "memcached://x"], "--cache"),
        (["--model", "a", "--jpeg-decoder", "gpu"], "--jpeg-decoder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(SettingsError, match=message):
        parse_arguments(flags, {})


def test_other_machines_may_reach_the_service_with_keys_or_insecure():
    with pytest.raises(SettingsError, match="give --api-key-file"):
        parse_arguments(["--model", "m", "--host", "0.0.0.0"], {})

    assert parse_arguments(["--model", "m", "--host", "0.0.0.0", "--insecure"], {})
    assert parse_arguments(["--model", "m", "--host", "0.0.0.0", "--api-key-file", "keys"], {})


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default():
    environment = {"REFINERY_PORT": "9000", "REFINERY_MAX_IMAGES": "5"}

    settings = parse_arguments(["--model", "m", "--port", "9001"], environment).settings

    assert (settings.port, settings.max_images, settings.drain_seconds) == (9001, 5, 30.0)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False)])
def test_switches_can_be_set_by_variables(text, value):
    settings = load_settings({"model": "m"}, {"REFINERY_INSECURE": text})

    assert settings.insecure is value


def test_an_unknown_variable_is_refused_with_the_nearest_name():
    with pytest.raises(SettingsError, match="REFINERY_BATCH_TOKEN: did you mean 'REFINERY_BATCH_"):
        load_settings({"model": "m"}, {"REFINERY_BATCH_TOKEN": "1"})


def test_the_kernels_own_variable_is_known_and_left_to_them():
    assert KERNELS_VARIABLE == dispatch.MODE_VARIABLE
    assert load_settings({"model": "m"}, {KERNELS_VARIABLE: "reference"}).model == ("m",)

    with pytest.raises(SettingsError, match="did you mean 'REFINERY_KERNELS'"):
        load_settings({"model": "m"}, {"REFINERY_KERNEL": "reference"})


def test_variables_of_other_programs_are_left_alone():
    assert load_settings({"model": "m"}, {"VIT_REFINERY_TEST_DATA": "x", "PORT": "1"}).port == 8000


def test_an_impossible_value_names_where_it_came_from():
    with pytest.raises(SettingsError, match="--port is '99999'"):
        parse_arguments(["--model", "m", "--port", "99999"], {})
    with pytest.raises(SettingsError, match="REFINERY_PRECISION is 'fp8'"):
        load_settings({"model": "m"}, {"REFINERY_PRECISION": "fp8"})


def test_a_missing_model_says_what_to_add():
    with pytest.raises(SettingsError, match="--model"):
        parse_arguments([], {})


def test_a_batch_must_hold_the_largest_image():
    with pytest.raises(SettingsError, match="set --batch-tokens to 8192 or more"):
        parse_arguments(["--model", "m", "--batch-tokens", "100"], {})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_address_that_others_reach_needs_insecure(host):
    with pytest.raises(SettingsError, match="add --insecure"):
        parse_arguments(["--model", "m", "--host", host], {})

    assert parse_arguments(["--model", "m", "--host", host, "--insecure"], {}).settings.insecure


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_addresses_need_nothing(host):
    assert parse_arguments(["--model", "m", "--host", host], {}).settings.host == host


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda", "cuda:0,cuda:1"])
def test_devices_are_given_as_a_list(device):
    assert load_settings({"model": "m", "device": device}, {}).device == device


def test_an_unknown_device_is_refused():
    with pytest.raises(SettingsError, match="device"):
        load_settings({"model": "m", "device": "tpu"}, {})


def test_help_names_flags_variables_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help"], {})

    text = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"REFINERY_{name.upper()})" in text
    assert "default 16384; REFINERY_BATCH_TOKENS" in text
    assert "REFINERY_KERNELS chooses" in text


def test_an_abbreviated_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--mod", "m"], {})
    assert "--mod" in capsys.readouterr().err


def test_the_shown_settings_hold_no_password():
    settings = Settings(model=("m",), cache="redis://user:secret@host:6379/0")

    assert "secret" not in settings.shown()
    assert "redis://user:***@host:6379/0" in settings.shown()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory", "memory"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user@h:6379/0", "redis://user@h:6379/0"),
        ("redis://:secret@h/0", "redis://:***@h/0"),
        ("redis://user:se:secret@h:6379/0", "redis://user:***@h:6379/0"),
        ("redis://user:secret@secret@h", "redis://user:***@h"),
        ("redis//:secret@h", "redis//:***@h"),
        ("redis:/:secret@h", "redis:***@h"),
    ],
)
def test_a_password_in_a_url_is_not_shown(url, shown):
    assert without_password(url) == shown


def test_no_password_is_shown_with_the_settings():
    settings = Settings(
        model=("m",), cache="redis://:se:secret@h", otlp_endpoint="http://user:secret@collector"
    )

    assert "secret" not in settings.shown()
    assert "secret" not in repr(settings)
    assert "http://user:***@collector" in settings.shown()


def test_no_password_is_shown_when_its_url_is_refused():
    with pytest.raises(SettingsError, match=r"redis//:\*\*\*@h") as caught:
        load_settings({"model": "m"}, {"REFINERY_CACHE": "redis//:secret@h"})

    assert "secret" not in str(caught.value)


def test_bodies_in_memory_are_at_least_one():
    with pytest.raises(SettingsError, match="max_held_body_bytes 10 is less"):
        load_settings({"model": "m", "max_body_bytes": "11", "max_held_body_bytes": "10"}, {})
