"""Agents, their signatures, and the models that they call."""
