"""Comparison of every op with its reference on small and awkward problems, for users to run on their machines.

A file in ``problems/`` holds the problems of one op, or of related ones; the files are found by name, not listed.
"""
