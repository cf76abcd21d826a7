"""What Transformers sees: the name "padam", which weights decay, the Trainer and its arguments, callbacks, metrics.

May import `resuming`, `optim` and the ground floor.
"""
