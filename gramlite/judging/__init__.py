"""From a pair to a verdict: templates, votes, confidence, the judge. May import backends and what is below it."""
