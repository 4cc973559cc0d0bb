"""A service that is swapped, broken, starved and killed under load, by a caller who knows the right answer to everything."""

import os

# Read when the Hub's client is imported. Plain HTTP, like everything here, and no bars between the lines of progress.
os.environ.update({"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
