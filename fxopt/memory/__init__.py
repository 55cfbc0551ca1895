"""The memory plan: what a training step keeps, recomputes or offloads so that it fits a budget in bytes."""
