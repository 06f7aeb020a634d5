"""Prediction over folders of any size, on this machine or on a Ray cluster.

A listing holds the photos and the names of their outputs; a worker decodes, runs and encodes them;
a store takes the outputs; the manifest records what is done, so that a killed run can resume.
"""
