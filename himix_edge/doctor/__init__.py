"""What a device has, what fits it, and the command for each thing missing: standard library only.

`facts.py` looks, `judge.py` concludes, `show.py` prints; python -m himix_edge.doctor does it all.
"""
