"""Run the ``flockapi`` command with ``python -m flock``."""

from flock.command.cli import main

if __name__ == "__main__":
    main(prog_name="flockapi")
