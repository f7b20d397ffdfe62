"""The rooms of the embedding server; llama_embeddings_server.py puts them together."""
