"""Export of checkpoints to ExecuTorch programs, and to other runtimes."""
