"""What the contract has to know of each metric."""
