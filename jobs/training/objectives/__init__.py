"""What a run can learn: one file for each objective. `jobs.training.work` is what they have in common."""
