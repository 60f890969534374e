"""Export: from a full-precision checkpoint to artifacts, with no loss beyond the dtype. May import all of gramlite but the commands."""
