"""A vanilla vision-language model, of the LLaVA kind, made into a HiMix model without training.

    source.py      folders as they come -> a TeacherSource: llava.py and tinyllava.py by family,
                   layout.py what they share, prompt.py where the image stands in the text
    teacher.py     the vanilla model in memory, and the HiMix model that shares its weights
    images.py      the pictures, and questions.py what is asked about them
    fit.py         the projections in closed form: moments.py the sums, sums.py how they are
                   collected and kept, attention.py how they may be weighted
    distil.py      the projections trained a little more, on what answers.py has the teacher say
    judge.py       how close it came, and blame.py where it loses
    report.py      all of that as data; page.py, plots.py, tables.py and card.py for people
    pipeline.py    from a folder to a checkpoint

What comes out is a checkpoint that `export` takes like any other. How a chat template is taken
apart is borrowed from there; nothing but the command line imports this package.
"""
