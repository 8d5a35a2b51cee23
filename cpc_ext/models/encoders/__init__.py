"""Encoders: each patch of an image, or an image, to one feature vector."""
