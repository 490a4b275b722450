"""One short handler per route."""
