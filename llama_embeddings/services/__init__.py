"""What the server can do; the only place where store, engine, index, documents and measures meet."""
