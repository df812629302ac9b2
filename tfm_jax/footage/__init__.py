"""Metrics of any videos, of real footage too, after five dimensions of VBench (arXiv 2311.17982).

Each metric is a class that takes the frames of a video one by one, so that the memory does not depend on the length of
the video. The formulas are those of VBench's code (Vchitect/VBench). Where VBench uses a network whose weights have to
be downloaded, ours may use something else; the name of the metric and its docstring then say so.
"""
