"""Every op against its reference, on small and awkward problems: what a user runs where nobody of us could.

A file in ``problems/`` holds those of one op; they are found, not listed.
"""
