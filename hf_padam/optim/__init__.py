"""The optimizer: PAdam, its update and the backends that run it, schedules, and the steering to a target sparsity.

Imports torch and the ground floor (`sparsity`, `files`) alone: nothing here knows of Transformers or accelerate.
"""
