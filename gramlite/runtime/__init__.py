"""Where a model runs: devices, memory, placement. May import formats and what is below it."""
