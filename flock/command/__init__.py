"""The ``flockapi`` command and its server."""
