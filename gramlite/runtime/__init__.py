"""Where a model runs and with how much memory: the machine, what a model takes of it, and where it goes. Loads no runtime.

May import gramlite.formats and what is below it.
"""
