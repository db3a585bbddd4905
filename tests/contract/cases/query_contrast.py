"""Contract settings of losses with queries, positives and hard negatives."""

import torch
from torch import nn

from lightning_reg.mechanisms.info_nce import nt_xent
from lightning_reg.techniques.contrastive.focal_info_nce import focal_info_nce
from lightning_reg.techniques.contrastive.online_hard_negative_mixing import mix_hard_negatives
from lightning_reg.testing import ContractCase
from tests.contract.cases.contrastive import VIEWS, TwoViewHost


class RetrievalHost(TwoViewHost):
    """The classifier, which also embeds queries, positives and three negatives of each sample."""

    def build(self, options):
        """Names for the embeddings."""
        super().build(options)
        self.third = nn.Sequential(nn.Linear(16, 3 * 16), nn.Unflatten(1, (3, 16)))

    def compute(self, batch):
        """Cross-entropy; the embeddings are there to be captured."""
        loss, signals = super().compute(batch)
        self.third(self.encoder(signals["inputs"].flip(1)))
        return loss, signals


def _normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def _mixtures(queries, candidates):
    pairs = torch.tensor([[0, 2], [1, 3]])
    shares = torch.tensor([0.3, 0.6], dtype=torch.float64)
    # The list-wise weights are constants to autograd.
    return mix_hard_negatives(queries.detach(), candidates, pairs, shares, list_wise=False)


CASES = {
    "DynamicBadPairMining": ContractCase(
        args={"start": 1, "noisy": 0.5, "faulty": 0.5, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[
            {"start": 0},
            {"noisy": 0.0},
            {"faulty": -1.0},
            {"temperature": 0.0},
            {"losses": ""},
            {"num_samples": 0},
        ],
        bad_late=[{"views": "no_such_layer"}],
        host=TwoViewHost,
        expected=lambda p: nt_xent(p.features["first"], p.features["second"], 0.2).mean(),
        gradcheck=lambda: (
            lambda a, b: nt_xent(a, b, 0.5),
            (_normal(4, 3), _normal(4, 3, seed=1)),
        ),
    ),
    "FocalInfoNCE": ContractCase(
        args={"strength": 0.5, "views": VIEWS, "negatives": "third", "temperature": 0.5},
        neutral={"strength": 0.0},
        bad=[{"gamma": -0.5}, {"temperature": 0.0}, {"negatives": ""}, {"views": []}],
        bad_late=[{"views": ["first", "no_such_layer"]}, {"negatives": "no_such_layer"}],
        host=RetrievalHost,
        expected=lambda p: focal_info_nce(
            *(p.features[name] for name in ("first", "second", "third")), temperature=0.5
        ).mean(),
        gradcheck=lambda: (
            lambda q, p, n: focal_info_nce(q, p, n, gamma=0.0),
            (_normal(4, 3), _normal(4, 3, seed=1), _normal(4, 2, 3, seed=2)),
        ),
    ),
    "OnlineHardNegativeMixing": ContractCase(
        args={"strength": 0.5, "views": VIEWS, "temperature": 0.5},
        neutral={"strength": 0.0},
        bad=[
            {"hardest": 1},
            {"pairs": -1},
            {"pairs": 0, "list_wise": False},
            {"alpha": 0.0},
            {"gamma": -1.0},
            {"temperature": -1.0},
        ],
        bad_late=[{"views": "no_such_layer"}, {"negatives": "no_such_layer"}],
        host=TwoViewHost,
        gradcheck=lambda: (_mixtures, (_normal(4, 3), _normal(4, 4, 3, seed=1))),
    ),
}
