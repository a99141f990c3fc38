"""What is saved of a run, so that it is whole or not there, and how a run goes on from it."""
