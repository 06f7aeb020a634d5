"""`srdeploy serve`: one process that answers segmentation requests over HTTP.

A request's way: guard (who asks, how much) -> routes (KServe v2, or plain images) -> hub (which
model) -> scheduler (decode, wait, compute, encode, each on threads of its own) -> answer.
"""
