"""Verbs over one run: from its config to its report."""
