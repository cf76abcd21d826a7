"""A run that is killed goes on: checkpoints that are whole or not there, exact resumption, signals, settings compared.

May import `optim` and the ground floor.
"""
