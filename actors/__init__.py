"""Thin: each actor lends one thing from `nexus` a process and a place."""
