"""Logits equal transformers', for the three kinds of T5; and the relative bias matters at every distance."""
