import asyncio
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service import logs

REPOSITORY = Path(__file__).parents[2]


def run_python(program):
    result = subprocess.run(
        [sys.executable, "-c", "import logging\nfrom service import logs\n" + program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.stderr.splitlines()


def formatted(message, *arguments, level=logging.INFO, **options):
    logger = logging.Logger("service.test")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logs.JsonFormatter().format(record))
    logger.addHandler(handler)
    logger.log(level, message, *arguments, **options)
    (line,) = lines
    assert "\n" not in line
    return json.loads(line)


def test_a_json_line_says_when_how_bad_who_and_what():
    document = formatted("loaded %s in %.1f s", "demo", 2.25, level=logging.WARNING)

    assert document["level"] == "warning"
    assert document["logger"] == "service.test"
    assert document["message"] == "loaded demo in 2.2 s"
    assert document["timestamp"].endswith("Z")
    age = datetime.now(UTC) - datetime.fromisoformat(document["timestamp"])
    assert abs(age) < timedelta(seconds=10)


def test_a_json_line_has_the_fields_of_its_call_and_no_empty_ones():
    document = formatted("answered", extra=logs.fields(status=200, key=None))

    assert document["status"] == 200
    assert "key" not in document


def test_fields_do_not_replace_what_every_line_has():
    assert formatted("said", extra=logs.fields(message="forged"))["message"] == "said"


@pytest.mark.parametrize(
    "text", ['a\nb\r\n{"level": "forged"}', "\u2028\u2029\x85", "\ud800", "\0"]
)
def test_no_text_breaks_a_json_line(text):
    document = formatted("client sent %s", text)

    assert document["message"] == f"client sent {text}"


def test_what_json_does_not_know_is_written_as_text():
    assert formatted("at", extra=logs.fields(path=Path("/x")))["path"] == "/x"


def test_an_exception_is_one_string():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        document = formatted("failed", exc_info=True)

    assert "ValueError: two\nlines" in document["exception"]


def test_lines_of_a_request_carry_what_is_known_of_it():
    async def request(number):
        token = logs.bind(request_id=str(number))
        await asyncio.sleep(0)
        before = formatted("begun")
        await asyncio.gather(asyncio.sleep(0), note_in_a_task(number))
        after = formatted("done")
        logs.unbind(token)
        return before, after, formatted("outside")

    async def note_in_a_task(number):
        logs.note(images=number)

    async def run():
        return await asyncio.gather(request(1), request(2))

    for number, (before, after, outside) in enumerate(asyncio.run(run()), start=1):
        assert before["request_id"] == after["request_id"] == str(number)
        assert after["images"] == number
        assert "images" not in before
        assert "request_id" not in outside


def test_a_note_outside_a_request_goes_nowhere():
    logs.note(images=3)

    assert "images" not in formatted("idle")


def test_lines_for_people_are_as_they_were():
    lines = run_python(
        "logs.configure('info', 'console')\n"
        "logging.getLogger('service.x').info('loaded %s', 'demo')\n"
        "logging.getLogger('service.x').debug('unseen')\n"
    )

    (line,) = lines
    assert line.endswith(" INFO service.x: loaded demo")


def test_json_is_all_that_a_process_writes_whatever_happens_to_it():
    lines = run_python(
        "import threading, warnings\n"
        "logging.getLogger('uvicorn.error').addHandler(logging.StreamHandler())\n"
        "logs.configure('info', 'json')\n"
        "logging.getLogger('uvicorn.error').info('started', extra={'color_message': 'x'})\n"
        "warnings.warn('odd image')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='worker')\n"
        "thread.start(); thread.join()\n"
        "raise RuntimeError('the end')\n"
    )

    documents = [json.loads(line) for line in lines]
    started, warned, thread, ended = documents
    assert (started["logger"], started["message"]) == ("uvicorn.error", "started")
    assert "odd image" in warned["message"]
    assert "ZeroDivisionError" in thread["exception"]
    assert "worker" in thread["message"]
    assert "RuntimeError: the end" in ended["exception"]
