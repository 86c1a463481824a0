"""Model cards from results."""
