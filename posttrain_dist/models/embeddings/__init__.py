"""What happens to the input embeddings: noise while training, rows of tokens that were added."""
