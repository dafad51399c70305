"""What a model is made of, from config.json: every tensor with its name and shape. No torch.

tensors.py     Linear, Layer, Network: the nouns
families/      one function an architecture family: config.json -> Network
"""
