"""The store: SQLite statements, groups of writes, migrations and files. Nothing else imports ``sqlite3``."""
