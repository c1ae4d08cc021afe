"""A vanilla vision-language model, of the LLaVA kind, made into a HiMix model without training.

source.py     folders as they come -> a TeacherSource
teacher.py    the vanilla model in memory, and the HiMix model that shares its weights
images.py, questions.py    what the two are compared on
fit.py        the projections, in closed form
distil.py     the projections, trained a little more
judge.py, report.py        how close it came
pipeline.py   all of it, from a folder to a checkpoint
"""
