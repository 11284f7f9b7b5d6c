"""Rows: tables in, results out."""
