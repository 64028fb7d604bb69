"""Adapters for servers: an expression that is asked for as a model name becomes a directory that a server can load."""
