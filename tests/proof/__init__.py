"""Small programs under thousands of orders of their tasks, threads and timers, in virtual time."""
