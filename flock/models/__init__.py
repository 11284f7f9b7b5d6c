"""Providers of models: calls, pace, prices, and the streams of their servers. It knows no agent."""
