"""The programs' command lines: options, and what is refused at once. What they do is imported only after that."""
