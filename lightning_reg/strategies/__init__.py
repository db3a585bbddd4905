"""The strategy ``ddp_reg``: DDP with a guard over the replicas."""
