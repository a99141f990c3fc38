"""Rows of data: where they are from, and which of them are good."""
