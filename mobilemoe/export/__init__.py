"""Export of checkpoints to ExecuTorch programs."""
