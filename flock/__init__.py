"""The implementation of Flock API. Import from ``flock.core``."""

__version__ = "0.1.0"
