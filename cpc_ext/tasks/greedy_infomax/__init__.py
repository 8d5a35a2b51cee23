"""Greedy InfoMax, and the supervised encoders that it is compared with."""
