"""The reference judge: its weights, and the files made of them. May import judging and what is below it."""
