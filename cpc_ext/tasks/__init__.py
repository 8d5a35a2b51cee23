"""Tasks, a folder each: models with their ways of learning from images or speech, all that the loop does not know."""
