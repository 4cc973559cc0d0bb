"""From a release on the Hub to something that people can use: Spaces, made and updated with one command each."""
