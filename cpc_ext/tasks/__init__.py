"""Tasks, a folder each: models with their ways of learning from images, and what the loop does not know of them."""
