"""Notices kernels that are compiled after the warm-up, when a request has to wait for them."""

from collections.abc import Callable
from typing import Any


def watch_compiles(on_compile: Callable[[], None]) -> Callable[[], None]:
    """Call `on_compile` for every Triton kernel that this process compiles from now on.

    Where Triton is missing (it is Linux's alone) nothing can be compiled.

    Returns:
        What ends it.
    """
    try:
        from triton import knobs
    except ImportError:
        return lambda: None
    before = knobs.runtime.jit_post_compile_hook

    def hook(**details: Any) -> Any:
        on_compile()
        return before(**details) if before is not None else None

    def end() -> None:
        if knobs.runtime.jit_post_compile_hook is hook:
            knobs.runtime.jit_post_compile_hook = before

    knobs.runtime.jit_post_compile_hook = hook
    return end
