"""Commands that look at, check, repair, convert or import artifacts."""
