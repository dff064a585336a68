"""Subcommands of `python -m trainer.evaluate`: `add_parser(commands)` and `run(arguments)` each."""
