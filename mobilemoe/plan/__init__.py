"""The scaling law, its fit to a table of runs, and the planner."""
