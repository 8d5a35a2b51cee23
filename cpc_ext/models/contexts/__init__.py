"""Context networks: encodings to contexts, of which each sees the encodings before it."""
