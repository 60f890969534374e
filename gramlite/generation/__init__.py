"""What a backend is asked for and answers: requests, decoders, prompts as token ids. May import runtime and what is below it."""
