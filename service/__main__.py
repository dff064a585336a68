"""python -m service --model models/demo [--host --port ...]; `--help` lists every setting."""

import logging
import os
import sys
from collections.abc import Sequence

from service.settings import Settings, SettingsError, parse_arguments

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
        sys.stdout.write(invocation.settings.model_dump_json(indent=2) + "\n")
        return 0
    logging.basicConfig(
        level=invocation.settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.captureWarnings(True)  # odd images make Pillow warn
    return _serve(invocation.settings)


def _serve(settings: Settings) -> int:
    # Threads of a forward that spin while they wait would take the cores from those that decode;
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Here, so that --help and a mistyped flag answer without loading torch.
    from backbone.errors import RefineryError
    from kernels.dispatch import KernelError, mode
    from service.app import create_app
    from service.server import DrainingServer

    try:
        mode()
    except KernelError as error:  # REFINERY_KERNELS, which is not the service's own
        sys.stderr.write(f"error: {error}\n")
        return _USAGE_STATUS
    app = create_app(settings)
    server = DrainingServer(app, settings)
    server.run()
    service = app.state.service
    status = server.exit_status
    if isinstance(service.failure, RefineryError | SettingsError | KernelError):
        sys.stderr.write(f"error: {service.failure}\n")
        status = _USAGE_STATUS
    if any(engine.is_alive for engine in service.engines):
        # The interpreter would be torn down under a thread that is inside torch, and abort.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
