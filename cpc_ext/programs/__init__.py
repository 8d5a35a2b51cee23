"""The programs: their command lines, one main, and what they do, which is imported once the options are right."""
