"""The user interface: command line, order of the stages, Ray connection, pages and tables."""
