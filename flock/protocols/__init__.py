"""Other protocols than the REST API: each module has the routes of one, and spells the same orders and answers."""
