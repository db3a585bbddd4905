"""Contract settings of techniques that ask a second loss about the gradient."""

import torch

from lightning_reg.techniques.gradients.agreement_gradient_dropout import agreement_probability
from lightning_reg.testing import ContractCase


def _gradients():
    # Away from 0, where the sign jumps.
    task = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    general = torch.tensor([3.0, 1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    return agreement_probability, (task, general)


CASES = {
    "AgreementGradientDropout": ContractCase(
        args={"strength": 1.0, "temperature": 2.0},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.5}, {"temperature": 0.0}],
        bad_late=[{"parameters": "no_such_name"}],
        gradcheck=_gradients,
        logs=("reg/agreement_gradient_dropout", "reg/agreement_gradient_dropout_second_loss"),
    ),
}
