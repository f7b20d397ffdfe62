"""What `python -m llama_embeddings` can do: one module for each subcommand."""
