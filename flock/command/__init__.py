"""The ``flockapi`` command, and our own server."""
