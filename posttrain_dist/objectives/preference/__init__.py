"""Preferences: objectives that compare answers, and what they share. docs/preferences.md."""
