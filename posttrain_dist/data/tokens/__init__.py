"""Text -> tokens with their characters.

text_tokens.py   the tokens of a text, whoever made them
byte_level.py    byte-level BPE word by word, each word tokenised once
patterns.py      ... the pattern that cuts words, as one of Python
"""
