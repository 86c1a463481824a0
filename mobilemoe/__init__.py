"""What people do with MobileMoE: plan, train, export, run, bench, eval, card. Importing it imports nothing else."""

__version__ = "0.1.0"
