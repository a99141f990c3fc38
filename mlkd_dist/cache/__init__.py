"""What a teacher said before: written, read, and whether it serves a run."""
