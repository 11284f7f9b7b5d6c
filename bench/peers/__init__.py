"""Servers and loops that do the same work as ``flockapi`` without it. None of them imports it."""
