"""What training jobs are made of. Each room imports only what stands to its right, or beside the rooms:

`drivers` → `state`, and `objectives` → `sharding` → `step`.
"""
