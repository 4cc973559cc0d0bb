"""The notebook for Kaggle's free 2x T4, and the command that checks, runs or pushes it: see README.md beside this file."""
