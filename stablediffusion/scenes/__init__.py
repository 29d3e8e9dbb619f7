"""Scenes of coloured shapes: their captions, drawings of them, and a classifier that reads them off pictures.

What the bundled model was trained to draw, so that what it does can be measured exactly.
"""
