"""Agents: what they take and give, and the models that they call."""
