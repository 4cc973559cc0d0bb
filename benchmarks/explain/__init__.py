"""Where the missing speed-up went: the parts of a training step at one process and at several, measured."""
