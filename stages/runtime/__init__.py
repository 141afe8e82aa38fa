"""Runs units of work: runners, retries, progress, devices."""
