"""How long a bundle takes on this machine, phase by phase, and how near that is to its limits.

limits.py       what the machine can do: bandwidth, products in fp32 and in int8
candidates.py   what is timed: HiMix from the picture's file on, and the same pair as vanilla
split.py        how much of the vision graph is the projections
cold.py         a fresh process: start to first token, and the most memory it holds
measure.py      all of it, in interleaved rounds
spread.py       min, median, max, and which rounds were disturbed
bounds.py       the floor of each phase at the machine's best rates; formulas: analysis/floors.py
report.py       all figures, as plain data
show.py         ... as text;  plot.py  ... as a picture
"""
