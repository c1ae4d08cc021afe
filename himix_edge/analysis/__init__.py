"""What a model costs, computed from its config alone, and the paper's figures beside it."""
