"""The entry point of the ``flockapi`` command, also with ``python -m flock``."""

import gc


def main() -> None:
    """Import the command without looking for garbage in what stays until the exit, then run it."""
    gc.disable()
    from flock.command.cli import main as command

    gc.freeze()
    gc.enable()
    command(prog_name="flockapi")


if __name__ == "__main__":
    main()
