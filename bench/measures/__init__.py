"""What is measured. Each measure returns the rows of the table that it fills."""
