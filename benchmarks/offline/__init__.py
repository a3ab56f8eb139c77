"""Beamline beside its peers, offline: same weights, same sentences, one run.

`side_by_side.py` runs all of it, `quick_gate.py` the four ratios that matter most. Every contender is a process of its
own (`worker.py`) and computes only while it is asked; `stages.py` asks one after the other, over and over.
"""
