"""Model, data, timing and reports of ``train_char_lm.py``."""
