"""The model in torch: what is trained, and what the exported graphs must agree with."""
