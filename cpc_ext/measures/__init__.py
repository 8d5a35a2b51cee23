"""Measures of what an encoder or a model of pixels is worth."""
