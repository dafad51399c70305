"""Decoder layers as programs on `autograd.Graph`, written in the order of transformers' own code.

features.py    which norms, activation, rotary, order of the parts: by model_type
attention.py   queries, keys, values of one row -> what they attend to
parts.py       projections, norms and MLP of a layer
layer.py       run_layer: one decoder layer
ends.py        what stands before the layers and behind them: embedding, head and loss
"""
