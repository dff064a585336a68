import base64
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from service import keys
from service.keys import Identity, KeyRing, key_line, main
from service.settings import SettingsError

REPOSITORY = Path(__file__).parents[2]
ALICE, ROOT = "alice-0123456789abcdef", "root-0123456789abcdef"
LINES = f"""
# who may ask
{key_line("alice", ALICE, is_admin=False)}   # until May
{key_line("root", ROOT, is_admin=True)}
"""


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def ring(key_file, monkeypatch):
    monkeypatch.setattr(keys, "_CHECK_SECONDS", 0.0)
    return KeyRing(key_file)


def bearer(key):
    return Headers({"authorization": f"Bearer {key}"})


def basic(user, key):
    text = base64.b64encode(f"{user}:{key}".encode()).decode()
    return Headers({"authorization": f"Basic {text}"})


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE),
        Headers({"authorization": f"bearer  {ALICE}"}),
        Headers({"x-api-key": ALICE}),
        basic("anyone", ALICE),
        basic("", ALICE),
        Headers({"authorization": "Bearer of-a-proxy", "x-api-key": ALICE}),
    ],
)
def test_a_key_is_taken_from_every_place_it_may_come_in(ring, headers):
    assert ring.authenticate(headers) == Identity("alice", is_admin=False)


@pytest.mark.parametrize(
    "headers",
    [
        Headers({}),
        bearer(""),
        bearer(ALICE + "x"),
        bearer(ALICE[:-1]),
        bearer(ALICE.upper()),
        bearer("alice"),
        bearer(keys.hash_key(ALICE)),
        bearer("é"),
        Headers({"authorization": ALICE}),
        Headers({"authorization": "Basic %%%"}),
        Headers({"authorization": "Basic " + base64.b64encode(ALICE.encode()).decode()}),
        basic(ALICE, ""),
        Headers({"x-api-key": ""}),
    ],
)
def test_what_is_no_key_is_nobody(ring, headers):
    assert ring.authenticate(headers) is None


def test_a_key_may_have_the_admin_right(ring):
    assert ring.authenticate(bearer(ROOT)) == Identity("root", is_admin=True)


def test_every_key_is_compared_whichever_it_is(ring, monkeypatch):
    compared = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)

    ring.authenticate(bearer(ALICE))

    assert len(compared) == len(ring) == 2
    assert all(len(a) == len(b) == 32 for a, b in compared)


def test_a_changed_file_counts_within_a_second(ring, key_file):
    key_file.write_text(key_line("bob", "bob-0123456789abcdef", is_admin=False))

    assert ring.authenticate(bearer("bob-0123456789abcdef")) == Identity("bob", is_admin=False)
    assert ring.authenticate(bearer(ALICE)) is None


def test_the_file_is_looked_at_once_a_second_at_most(key_file, monkeypatch):
    ring = KeyRing(key_file)
    looks = []
    monkeypatch.setattr(keys, "_signature", lambda path: looks.append(path))

    for _ in range(1000):
        ring.authenticate(bearer(ALICE))

    assert looks == []


def test_a_link_that_leads_to_another_file_counts_as_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "_CHECK_SECONDS", 0.0)
    for name, line in (("old", key_line("alice", ALICE, is_admin=False)),
                       ("new", key_line("carol", ALICE, is_admin=False))):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(line)
        os.utime(tmp_path / name / "keys", (1, 1))
    (tmp_path / "data").symlink_to("old")
    (tmp_path / "keys").symlink_to("data/keys")  # as Kubernetes mounts a secret
    ring = KeyRing(tmp_path / "keys")

    (tmp_path / "data_next").symlink_to("new")
    (tmp_path / "data_next").rename(tmp_path / "data")

    assert ring.authenticate(bearer(ALICE)) == Identity("carol", is_admin=False)


@pytest.mark.parametrize("change", ["removed", "damaged"])
def test_keys_stay_valid_while_the_file_cannot_be_used_and_the_log_says_so_once(
    ring, key_file, change, caplog
):
    if change == "removed":
        key_file.unlink()
    else:
        key_file.write_text(LINES + "half a li")

    for _ in range(3):
        assert ring.authenticate(bearer(ALICE)) == Identity("alice", is_admin=False)

    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 1
    assert "2 keys read before stay valid" in lines[0].getMessage()
    assert ALICE not in lines[0].getMessage()


def test_a_file_that_is_right_again_is_read_again(ring, key_file):
    content = key_file.read_text()
    key_file.unlink()
    ring.authenticate(bearer(ALICE))

    key_file.write_text(content.replace("alice", "alison"))

    assert ring.authenticate(bearer(ALICE)) == Identity("alison", is_admin=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("carol", "1 words"),
        ("carol secret-in-clear", "no SHA-256"),
        (f"carol {'0' * 63}", "no SHA-256"),
        (f"carol {'0' * 64} root", "not 'admin'"),
        (f"carol {'0' * 64} admin please", "4 words"),
        (f"car/ol {'0' * 64}", "name"),
        (f"alice {'0' * 64}", "taken"),
        (key_line("carol", ALICE, is_admin=False), "same key"),
    ],
)
def test_a_line_that_is_no_key_is_refused_by_its_number_and_not_shown(key_file, line, message):
    key_file.write_text(LINES + line + "\n")

    with pytest.raises(SettingsError, match=r"line 5") as caught:
        KeyRing(key_file)

    assert message in str(caught.value)
    assert "secret-in-clear" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        KeyRing(tmp_path / "none")
    with pytest.raises(SettingsError, match="Is a directory"):
        KeyRing(tmp_path)


@pytest.mark.parametrize("nobody", ["", "# nobody yet\n"])
def test_a_file_without_keys_admits_nobody_until_one_is_added(
    tmp_path, caplog, monkeypatch, nobody
):
    monkeypatch.setattr(keys, "_CHECK_SECONDS", 0.0)
    path = tmp_path / "keys"
    path.write_text(nobody)
    ring = KeyRing(path)

    assert "has no keys" in caplog.text
    assert ring.authenticate(bearer(ALICE)) is None

    path.write_text("# somebody\n" + key_line("alice", ALICE, is_admin=False))
    assert ring.authenticate(bearer(ALICE)) == Identity("alice", is_admin=False)
    path.write_text(nobody)
    assert ring.authenticate(bearer(ALICE)) is None


def test_the_command_prints_a_key_and_a_line_that_admits_it(tmp_path, capsys):
    assert main(["new", "bob"]) == 0

    key, line = capsys.readouterr().out.splitlines()
    (tmp_path / "keys").write_text(line)
    assert KeyRing(tmp_path / "keys").authenticate(bearer(key)) == Identity("bob", is_admin=False)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", key)


def test_the_command_appends_to_the_file_of_the_service_s_environment(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("REFINERY_API_KEY_FILE", str(tmp_path / "keys"))

    assert main(["new", "bob"]) == 0

    ring = KeyRing(tmp_path / "keys")
    assert ring.authenticate(bearer(capsys.readouterr().out.strip())).name == "bob"


def test_the_first_key_is_made_without_a_warning_that_there_is_none(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text("# nobody yet\n")

    assert main(["new", "bob", "--file", str(path)]) == 0

    assert "has no keys" not in caplog.text


def test_the_command_makes_a_file_that_others_cannot_read(tmp_path, capsys):
    path = tmp_path / "keys"

    assert main(["new", "bob", "--file", str(path)]) == 0
    assert main(["new", "root", "--admin", "--file", str(path)]) == 0

    bob, root = capsys.readouterr().out.splitlines()
    ring = KeyRing(path)
    assert ring.authenticate(bearer(bob)) == Identity("bob", is_admin=False)
    assert ring.authenticate(bearer(root)) == Identity("root", is_admin=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert bob not in path.read_text()


def test_the_command_revokes_one_key_and_a_running_service_follows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keys, "_CHECK_SECONDS", 0.0)
    monkeypatch.setenv("REFINERY_API_KEY_FILE", str(tmp_path / "keys"))
    made = {}
    for name in ("a.b", "axb"):  # a point is a point
        assert main(["new", name]) == 0
        made[name] = capsys.readouterr().out.strip()
    ring = KeyRing(tmp_path / "keys")

    assert main(["revoke", "a.b"]) == 0

    assert ring.authenticate(bearer(made["a.b"])) is None
    assert ring.authenticate(bearer(made["axb"])) == Identity("axb", is_admin=False)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600
    assert main(["revoke", "axb"]) == 0
    assert ring.authenticate(bearer(made["axb"])) is None
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_revoking_a_key_that_is_not_there_is_an_error(key_file, capsys):
    before = key_file.read_text()

    assert main(["revoke", "nobody", "--file", str(key_file)]) == 2

    assert "no key called 'nobody'" in capsys.readouterr().err
    assert key_file.read_text() == before


def test_the_command_lists_names_and_rights_but_no_hash(key_file, capsys):
    assert main(["list", "--file", str(key_file)]) == 0

    shown = capsys.readouterr().out
    assert "alice" in shown.splitlines()
    assert any(line.endswith(" admin") for line in shown.splitlines())
    assert not re.search(r"[0-9a-f]{16}", shown)


def test_the_command_appends_after_a_last_line_that_is_open(key_file, capsys):
    key_file.write_text(LINES.rstrip("\n"))

    assert main(["new", "bob", "--file", str(key_file)]) == 0

    assert len(KeyRing(key_file)) == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "a b"], "name"),
        (["new", "alice", "--file", "{file}"], "taken"),
        (["new", "bob", "--file", "/no/such/folder/keys"], "No such file"),
    ],
)
def test_the_command_says_what_is_wrong(key_file, arguments, message, capsys):
    before = key_file.read_text()

    assert main([argument.format(file=key_file) for argument in arguments]) == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert key_file.read_text() == before


def run_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "service.keys", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_the_command_hashes_a_key_from_standard_input():
    result = run_command("hash", input=ALICE + "\n")

    assert result.stdout.strip() == keys.hash_key(ALICE)


@pytest.mark.parametrize("key", ["guessable", "two words and more", "é" * 20, ""])
def test_the_command_hashes_no_key_that_could_be_guessed_or_not_be_sent(key):
    result = run_command("hash", input=key + "\n")

    assert (result.returncode, result.stdout) == (2, "")
    assert "a key is 16 or more ASCII characters" in result.stderr


def test_a_request_that_shows_many_keys_is_nobody_and_costs_nothing(ring, monkeypatch):
    monkeypatch.setattr(keys.hmac, "compare_digest", None)
    headers = Headers(raw=[(b"x-api-key", ALICE.encode())] * 5)

    assert ring.authenticate(headers) is None
