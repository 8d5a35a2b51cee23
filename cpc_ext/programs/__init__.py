"""The programs: their command lines, a common entry point, and their work, imported after the options are checked."""
