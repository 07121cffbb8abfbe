"""What training jobs are made of: driver, worker, objectives, checkpoints."""
