"""Containers: files, folders, globs and hub datasets to located raw rows, in bounded memory."""
