"""`make faults`: what is promised of runs that are interrupted, measured on the machine at hand."""
