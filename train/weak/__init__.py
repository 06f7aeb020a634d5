"""Weak supervision: from image-level tags to pseudo masks that `srdeploy train` trains on.

A multi-label classifier, class activation maps, their refinement, and masks with ignored pixels.
"""
