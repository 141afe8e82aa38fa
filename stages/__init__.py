"""One package per job, shared packages below; tests/test_floors.py says which may import which."""
