"""Verbs over machines: jobs and what a machine lacks."""
