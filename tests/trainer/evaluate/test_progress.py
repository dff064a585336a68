import io
import logging

from rich.console import Console

from trainer.evaluate.progress import SILENT, Progress


def run(progress, steps=3):
    with progress.stage("encode raw", total=steps + 2, done=2) as advance:
        for _ in range(steps):
            advance(1)


def test_a_terminal_gets_a_bar():
    screen = io.StringIO()

    run(Progress(Console(file=screen, force_terminal=True, width=80)))

    assert "encode raw" in screen.getvalue()
    assert "5/5" in screen.getvalue()


def test_elsewhere_there_is_a_log_line_and_no_control_codes(caplog):
    screen = io.StringIO()

    with caplog.at_level(logging.INFO):
        run(Progress(Console(file=screen)))

    assert screen.getvalue() == ""
    assert "encode raw: 5 of 5 in 0 s, 0 s left" in caplog.text
    assert caplog.text.count("encode raw") == 1


def test_silence_is_possible(caplog):
    with caplog.at_level(logging.INFO):
        run(SILENT)

    assert caplog.text == ""
