"""The machines and what they agree on."""
