"""Evaluations of trained encoders, and their records."""
