"""Context networks, which map encodings to contexts that summarise the encodings so far."""
