"""Measures of the quality of encoders and of pixel models."""
