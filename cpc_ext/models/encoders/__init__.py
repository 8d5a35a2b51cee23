"""Encoders: each patch of an image, an image, or each frame of a waveform to one feature vector."""
