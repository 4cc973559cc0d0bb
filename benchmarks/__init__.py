"""Programs that measure. Each runs the entries as a user does, writes results/<name>.json and makes a page from it."""
