"""The embedded engine: runs and batches in this process, kept in SQLite."""
