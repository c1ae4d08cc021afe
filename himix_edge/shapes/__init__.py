"""The world of the demo model: simple scenes, questions about them, and the right answers.

`docs/shapes.md` describes it for whoever wants to draw such a scene by hand.
"""
