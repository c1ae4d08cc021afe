"""The one reader of what a user has in a folder: pictures, prompts.txt and questions.jsonl.

pictures.py      the pictures, and as `pixel_values`
questions.py     what is asked about them: prompts.txt about all, questions.jsonl about single ones
text_lines.py    the lines of such a text, or what is wrong with it
"""
