"""A model that several processes share: FSDP2's slices, tensor parallel, pipeline parallel, and the arithmetic that chooses."""
