"""Where documents and vectors are kept; a file's name is its name in the configuration."""
