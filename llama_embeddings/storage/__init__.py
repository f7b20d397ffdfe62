"""The store: a database that remembers every embedding, and the one writer in front of it."""
