"""A pretrained Transformer becomes a Backpack: senses are learnt on top of it, from what it predicts itself."""
