"""The page and the lines of a plan, drawn from its JSON."""
