"""Programs whose checkpoints are known, one a module, called as the program is; PROGRAM in it reads and writes them."""
