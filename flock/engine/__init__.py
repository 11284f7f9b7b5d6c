"""The embedded engine: runs and batches are executed in this process and stored in SQLite."""
