"""What models say after a prompt: for the report, and for steps that learn from it."""
