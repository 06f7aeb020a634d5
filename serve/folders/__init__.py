"""Prediction over folders of any size, on this machine or on a Ray cluster.

A listing says which photos there are and what their outputs are called; a worker decodes, runs and
encodes them; a store takes the outputs; the manifest says what is done, so that a run that was
killed goes on.
"""
