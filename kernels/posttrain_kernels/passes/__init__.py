"""What the functions are made of: chunks, matrix products, the pass over a row of logits."""
