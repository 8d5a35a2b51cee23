"""Encoders, which map each patch of an image, a whole image, or each frame of a waveform to a feature vector."""
