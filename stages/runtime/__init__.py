"""How units of work run: the runner, retries, progress, devices."""
