"""`srdeploy serve`: one process that answers segmentation requests over HTTP.

A request passes: middleware (access, admission) -> routes (plain images, or KServe v2) -> model
registry -> scheduler (decode, wait, compute, encode, off the event loop) -> answer.
"""
