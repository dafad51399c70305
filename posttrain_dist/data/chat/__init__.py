"""Chat templates, masks and checks: Record -> Example."""
