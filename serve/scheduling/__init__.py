"""How many images are run at once, by whom and in what order: for the server and for folders.

A task (one image, one tensor) is decoded and encoded by codec threads, and run by a model's lanes,
whose sessions are laid out by measuring.
"""
