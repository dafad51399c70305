"""Verbs over a trained model: how good it is."""
