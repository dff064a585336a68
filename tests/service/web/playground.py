"""What tests do with the playground, and what they read off it."""

import shlex
import subprocess

import numpy as np

READY = "document.querySelector('#status').textContent === 'Ready.'"
ANSWERED = "document.querySelector('#status').textContent.startsWith('Click a patch')"
FAILED = "!document.querySelector('#error').hidden"
_STATE = "(await import('/static/app.js')).state"


def show(page, photograph):
    page.choose_file("#file", photograph)
    page.wait_for(ANSWERED)


def ask_state(page, expression):
    return page.evaluate(f"(async () => {{ const state = {_STATE}; return {expression}; }})()")


def pixels(page, name):
    """The canvas of a panel, [rows, columns, 4]."""
    shape, values = page.evaluate(
        f"""(() => {{
            const canvas = document.querySelector("#{name} .frame canvas");
            const {{ width, height }} = canvas;
            const {{ data }} = canvas.getContext("2d").getImageData(0, 0, width, height);
            return [[height, width, 4], [...data]];
        }})()"""
    )
    return np.array(values, dtype=np.uint8).reshape(shape)


def row_of(page, kind):
    return page.evaluate(
        f"[...document.querySelector('#{kind}-patch').cells].slice(1).map((c) => c.textContent)"
    )


def run_curl(page, photograph):
    command = shlex.split(page.text("#curl").replace("\\\n", " "))
    output = photograph.parent / command[command.index("-o") + 1]
    subprocess.run(command, cwd=photograph.parent, check=True, timeout=30)
    return output.read_bytes()
