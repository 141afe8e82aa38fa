"""Commands that verify, repair, convert, compare, export and import artifacts."""
