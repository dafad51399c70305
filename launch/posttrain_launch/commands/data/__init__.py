"""Verbs over data: what would be trained on."""
