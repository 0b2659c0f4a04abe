"""What happens to the chain when things break: killed, out of disk, read-only, damaged, started twice.

Every stage of a small chain is run once undisturbed. Then single stages are run again with one fault each, at a seeded
random moment, and restarted: the result must be the undisturbed one, or one clear line.
Command: python -m tests.faults --faults 240 --seed 0 --data RQ-VAE/data/emoji
"""
