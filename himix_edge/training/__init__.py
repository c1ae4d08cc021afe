"""Training: the paper's two stages, and what must come before them when nothing is pretrained."""
