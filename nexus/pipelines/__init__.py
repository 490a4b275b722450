"""Ways to answer; a file's name is the pipeline's name."""
