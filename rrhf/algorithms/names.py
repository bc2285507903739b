"""Names of the estimators and losses that settings may select; does not import torch."""

KL_ESTIMATORS = ("k1", "k2", "k3", "k3_with_k2_gradient")
KL_LOSS_ESTIMATORS = ("k2", "k3", "k3_with_k2_gradient")
TOKEN_LOSS_TYPES = ("token-wise", "per_sample", "average")
