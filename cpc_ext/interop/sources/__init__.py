"""The supported programs, one module each, named after the program; its PROGRAM reads and writes the checkpoints."""
