"""From token ids to vectors: one engine per loaded model, fed by a batcher, run by llama.cpp."""
