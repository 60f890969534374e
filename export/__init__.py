"""Export: from a full-precision checkpoint to artifacts, with no loss beyond the dtype."""
