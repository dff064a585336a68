"""What docs/api.md and docs/operations.md show is run, and they leave nothing out."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from typing import NamedTuple, get_args

import pytest

from service import protocol, schemas
from service.app import create_app
from service.bodies import REQUEST_TYPES
from service.client import FeatureClient
from service.command_line import ENV_PREFIX, KERNELS_VARIABLE
from service.errors import ServiceError
from service.metrics import STAGES
from service.negotiation import MEDIA_TYPES
from service.options import CacheUse, Dtype, FeatureOptions, Include, Layout
from service.settings import Settings
from tests.support import ROOT, running_server

API = (ROOT / "docs" / "api.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 300


class Section(NamedTuple):
    title: str
    text: str

    @property
    def blocks(self):
        """(language, text) of what is shown, in order."""
        return FENCE.findall(self.text)


def sections(document):
    parts = re.split(r"^#+ (.*)$(?=\n\n)", document, flags=re.MULTILINE)
    found = [Section(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True)]
    return [section for section in found if section.blocks]


def table(document, heading):
    """Cells of the rows of the table whose first column has that heading."""
    rows = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", document, re.M)
    assert rows, f"no table of {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def named(document, *headings):
    """What the first cells of some tables name."""
    cells = [row[0] for heading in headings for row in table(document, heading)]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def shown_command(start):
    """The words of the indented command line of api.md that begins like that."""
    (line,) = re.findall(rf"^    (python {re.escape(start)}.*)$", API, re.MULTILINE)
    return shlex.split(line)[1:]


class Stand:
    """A working folder like the repository, and the services that the examples ask."""

    def __init__(self, folder, ports):
        self.folder = folder
        self.ports = ports

    def run(self, language, code):
        """What an example prints; it must succeed."""
        for shown, actual in self.ports.items():
            code = code.replace(shown, actual)
        words = (
            [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
        )
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        done = subprocess.run(
            [*words, code],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    words = shown_command("-m service --model models/demo --model raw=")
    with running_server(tmp_path_factory.mktemp("server") / "log", *words[2:]) as url:
        yield url


def open_stand(folder, **ports):
    for name in ("examples", "models", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return Stand(folder, ports)


@pytest.fixture
def stand(tmp_path, server):
    ports = {"127.0.0.1:8000": server.removeprefix("http://"), "8003": str(free_port())}
    return open_stand(tmp_path, **ports)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A stand with the second service of api.md, which has keys and fetches URLs."""
    stand = open_stand(tmp_path_factory.mktemp("guarded"))
    (make_keys,) = [
        text for kind, text in FENCE.findall(API) if kind == "sh" and "service.keys new" in text
    ]
    stand.run("sh", make_keys)
    files = free_port()
    words = [word.replace("9000", str(files)) for word in shown_command("-m http.server")]
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        until_it_listens(files)
        words = shown_command("-m service --model models/demo --port 8001")[2:]
        place = words.index("--port")
        assert words[place : place + 2] == ["--port", "8001"]
        del words[place : place + 2]
        words = [word.replace("9000", str(files)) for word in words]
        words[words.index("keys.txt")] = str(stand.folder / "keys.txt")
        url = stack.enter_context(running_server(stand.folder / "guarded.log", *words))
        stand.ports = {"127.0.0.1:8001": url.removeprefix("http://"), ":9000": f":{files}"}
        yield stand


def until_it_listens(port):
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


EXAMPLES = [
    pytest.param(section, id=f"{name}: {section.title}")
    for name, document in (("api", API), ("operations", OPERATIONS))
    for section in sections(document)
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: not run")
@pytest.mark.parametrize("section", EXAMPLES)
def test_examples_print_what_is_shown(section, request):
    needs_keys = "127.0.0.1:8001" in section.text
    stand = request.getfixturevalue("guarded" if needs_keys else "stand")
    blocks = [*section.blocks, ("", "")]

    for (language, code), (next_language, output) in zip(blocks, blocks[1:], strict=False):
        if language in ("text", "yaml") or (needs_keys and "service.keys new" in code):
            continue
        printed = stand.run(language, code)
        if next_language == "text":
            assert printed.strip() == output.strip()
        else:
            assert language == "sh", "every Python block is followed by its output"


def test_every_option_is_listed_with_its_default():
    rows = {row[0].strip("`"): row for row in table(API, "option")}

    assert list(rows) == list(FeatureOptions.model_fields)
    for name, field in FeatureOptions.model_fields.items():
        default = rows[name][2]
        if field.default in (None, ()):
            assert "`" not in default, name
        else:
            value = field.default[0] if isinstance(field.default, tuple) else field.default
            assert default == f"`{str(value).lower()}`", name
    for name, choices in (
        ("dtype", Dtype),
        ("layout", Layout),
        ("include", Include),
        ("cache", CacheUse),
    ):
        assert set(re.findall(r"`(\w+)`", rows[name][1])) == set(get_args(choices)), name


def all_errors(base=ServiceError):
    assert protocol.MalformedRequestError in ServiceError.__subclasses__()
    for error in base.__subclasses__():
        if error.__module__.startswith("service."):
            yield error
            yield from all_errors(error)


def test_every_error_is_listed_with_its_status():
    listed = {(row[0], row[1].strip("`"), row[2]) for row in table(API, "status")}

    assert listed == {
        (str(error.status), error.code, "yes" if error.retryable else "no")
        for error in set(all_errors())
    }


def test_every_media_type_is_listed():
    assert named(API, "`Content-Type`") == set(REQUEST_TYPES)
    assert named(API, "`Accept`") == set(MEDIA_TYPES)


@pytest.fixture(scope="module")
def app():
    return create_app(Settings(model="models/demo"))


def test_every_path_and_header_of_the_openapi_document_is_explained(app):
    document = app.openapi()
    paths = named(API, "path") | {"POST /features"}
    listed = {path.split()[-1] for path in paths}

    assert set(document["paths"]) | {"/docs", "/openapi.json", "/"} == listed
    parameters = document["paths"]["/features"]["post"]["parameters"]
    headers = {item["name"] for item in parameters if item["in"] == "header"}
    assert headers <= named(API, "of a request")


def test_every_header_of_an_answer_is_explained(server):
    photograph = (ROOT / "examples" / "photographs" / "cat.jpg").read_bytes()
    headers = {"content-type": "image/jpeg", "accept": "application/octet-stream"}
    request = urllib.request.Request(f"{server}/features", photograph, headers)

    with urllib.request.urlopen(request) as response:
        sent = {name.lower() for name in response.headers}

    plain = {"connection", "content-length", "content-type", "date"}
    assert sent - plain <= named(API, "of an answer")
    for stage in STAGES:
        assert f"`{stage}`, " in API, stage


@pytest.mark.parametrize("query", ["pool=2&project=3", "boxes=1,2,30,40&box_size=2"])
def test_every_key_of_the_metadata_is_explained(server, query):
    photograph = (ROOT / "examples" / "photographs" / "cat.jpg").read_bytes()
    headers = {"content-type": "image/jpeg"}
    request = urllib.request.Request(f"{server}/features?{query}", photograph, headers)

    with urllib.request.urlopen(request) as response:
        size = int.from_bytes(response.read(8), "little")
        metadata = json.loads(response.read(size))["__metadata__"]

    options = {"pool", "project", "box_size"}
    assert set(metadata) - options <= named(API, "key")
    assert set(json.loads(metadata["images"])[0]) <= named(API, "of an image")


def test_every_limit_and_every_field_of_info_is_explained():
    assert named(API, "limit") == set(schemas.LimitsInfo.model_fields)
    for part in (schemas.Info, schemas.ModelInfo, schemas.Tolerance):
        for field in part.model_fields:
            assert f"`{field}`" in API, field


def test_limits_are_listed_with_their_defaults():
    settings = Settings(model="m")
    # Set by no flag of their own, or by measuring.
    others = {"max_box_size", "max_json_values", "max_pool", "max_queue_tokens", "url_hosts"}

    for names, default, _ in table(API, "limit"):
        for name, text in zip(re.findall(r"\w+", names), default.split(", "), strict=True):
            if name not in others:
                assert float(getattr(settings, name)) == float(text.replace("false", "0")), name


def test_every_argument_of_the_client_is_explained():
    arguments = FeatureClient.__init__.__annotations__.keys() - {"url", "transport", "return"}

    for name in arguments:
        assert f"`{name}`" in API, name


def shown_default(field):
    if field.is_required():
        return "required"
    if field.default is None or field.default == ():
        return "none"
    return "off" if field.default is False else str(field.default)


def test_every_flag_is_listed_with_its_default_and_the_rule_for_its_variable():
    rows = re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*) \|", OPERATIONS, re.MULTILINE)

    assert len(rows) == len(dict(rows))
    assert {flag: default.strip() for flag, default in rows} == {
        "--" + name.replace("_", "-"): shown_default(field)
        for name, field in Settings.model_fields.items()
    }
    assert f"`{ENV_PREFIX}BATCH_TOKENS`" in OPERATIONS
    assert f"`{KERNELS_VARIABLE}`" in OPERATIONS


def test_every_metric_is_explained(app):
    registered = {
        metric.name + "_total" * (metric.type == "counter")
        for metric in app.state.service.metrics.registry.collect()
    }

    assert named(OPERATIONS, "metric") == registered


@pytest.mark.parametrize("document", [API, OPERATIONS])
def test_files_that_are_linked_exist(document):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document)
    local = [link for link in links if not link.startswith("http")]

    assert local
    for link in local:
        assert (ROOT / "docs" / link).exists(), link
