"""Reading rows from tables, and writing the results of batches."""
