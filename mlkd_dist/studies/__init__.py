"""Methods x seeds x budgets, from one command."""
