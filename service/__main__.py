"""python -m service --model models/demo [--host --port ...]; `--help` lists every setting."""

import gc
import logging
import os
import sys
import threading
from collections.abc import Sequence

from service import logs
from service.command_line import parse_arguments
from service.folders import check_folders
from service.settings import Settings, SettingsError

logger = logging.getLogger("service")

_USAGE_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service until a signal; the exit status is explained in `--help`."""
    try:
        invocation = parse_arguments(sys.argv[1:] if arguments is None else arguments, os.environ)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USAGE_STATUS
    if invocation.print_config:
        sys.stdout.write(invocation.settings.shown() + "\n")
        return 0
    settings = invocation.settings
    logs.configure(settings.log_level, settings.log_format)
    try:
        check_folders(os.environ, must_execute=settings.device.startswith("cuda"))
    except SettingsError as error:
        return _refuse(error, settings)
    return _serve(settings)


def _serve(settings: Settings) -> int:
    # Threads of a forward that spin while they wait would take the cores from those that decode;
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Here, so that --help and a mistyped flag answer without loading torch.
    from backbone.errors import RefineryError
    from kernels.dispatch import KernelError, mode
    from service.app import create_app
    from service.graphs import GraphError
    from service.server import DrainingServer

    try:
        mode()
        app = create_app(settings)
    except (RefineryError, KernelError, SettingsError) as error:
        return _refuse(error, settings)
    # A full pass of the garbage collector holds up every thread. Over what the libraries made it
    # takes a third of a second, and none of that is garbage. Models are loaded later and may go.
    gc.collect()
    gc.freeze()
    server = DrainingServer(app, settings)
    try:
        server.run()
    except SystemExit:  # uvicorn's, who has logged why it cannot listen
        server.exit_status = _USAGE_STATUS
    gc.unfreeze()  # else libraries complain at the end that theirs was left behind
    if app.state.tracer is not None:
        app.state.tracer.close()
    service = app.state.service
    status = server.exit_status
    if isinstance(service.failure, RefineryError | SettingsError | KernelError | GraphError):
        status = _refuse(service.failure, settings)
    if threading.active_count() > 1:
        # The interpreter would be torn down under a thread that may be inside torch, and abort.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
    return status


def _refuse(error: Exception, settings: Settings) -> int:
    """Say why the service cannot run, in the form of its other lines; the exit status."""
    if settings.log_format == "json":
        logger.critical("%s", error)
    else:
        sys.stderr.write(f"error: {error}\n")
    return _USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main())
