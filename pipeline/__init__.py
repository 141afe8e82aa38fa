"""What a person runs: the command line, the order of the stages, the Ray connection, pages and tables."""
