"""Small files: sparse checkpoints packed without loss, loaded again, verified, reported on and described in a card.

May import `training`, whose answer to "which weights" its reports give, and all that lies below.
"""
