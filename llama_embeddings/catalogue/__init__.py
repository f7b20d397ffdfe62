"""Which models exist, where their files come from, and whether a file may be given to the engine."""
