"""The index over stored vectors; a cache of the database, found again from it at any time."""
