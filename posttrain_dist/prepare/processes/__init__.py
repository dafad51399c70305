"""Encoding in several processes.

workers.py      units of files in, chunks of rows out, in order (this side)
fork_server.py  one process that loads tokenizer and template, and forks those that encode
"""
