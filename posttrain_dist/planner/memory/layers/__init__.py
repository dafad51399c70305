"""Decoder layers as programs on `autograd.Graph`, written in the order of transformers' own code.

features.py       which norms, activation, rotation, order of the parts: by model_type
projections.py    queries, keys and values from hidden states
row_attention.py  queries, keys, values of one row -> what they attend to
parts.py          norms, attention block and MLP of a layer
layer.py          run_layer: one decoder layer
repeated.py       all layers: of equal ones the first and the last are replayed
ends.py           what stands before the layers: the batch, embeddings, positions
head.py           behind them: the loss of the head, log-probabilities, scores
"""
