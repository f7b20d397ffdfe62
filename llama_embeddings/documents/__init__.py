"""Documents: bytes to text, text to sentences, and rows to the files that are sent back."""
