"""One package per stage, and shared packages below. tests/test_floors.py lists which package may import which."""
