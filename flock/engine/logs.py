"""An earlier name of ``flock.logs``, which logging set-ups of users contain."""

from flock.logs import JSONFormatter

__all__ = ["JSONFormatter"]
