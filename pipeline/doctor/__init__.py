"""`python -m pipeline.doctor`: examines a launch before hours are spent on it. `__main__` has the command."""
