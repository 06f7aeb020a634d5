"""Runs tasks on models: for the server and for folders.

A task (one image or one tensor) is decoded and encoded by codec threads and run by a model's worker
threads. Each worker has its own session; how many sessions a model gets is measured.
"""
