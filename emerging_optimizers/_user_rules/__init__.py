"""Rules that users write in Python."""
