"""Models and their parts, whatever family they are of."""
