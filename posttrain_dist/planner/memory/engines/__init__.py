"""What each engine holds, and what it does around operations."""
