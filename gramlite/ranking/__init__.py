"""From verdicts on pairs to an order of completions. May import judging and what is below it."""
