"""What turns texts into vectors and prompts into answers; a file's name is its name in the configuration."""
