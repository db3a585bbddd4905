"""Losses on regions and confusion counts, and what else segmentation brings."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.contrastive.mann_whitney_loss import mann_whitney_loss
from lightning_reg.techniques.features.functional_entropy_regularizer import (
    functional_entropy_regularizer,
)
from lightning_reg.techniques.inputs.augmentation_policy import augmentation_policy
from lightning_reg.techniques.inputs.manifold_mixup import manifold_mixup
from lightning_reg.techniques.labels.bag_instance_interpolation import bag_instance_interpolation
from lightning_reg.techniques.labels.score_distribution_soft_label import (
    score_distribution_soft_label,
)
from lightning_reg.techniques.labels.thurstone_fidelity_loss import (
    _mean_and_std,
    thurstone_fidelity_loss,
)
from lightning_reg.techniques.reweighting.any_loss import any_loss
from lightning_reg.techniques.segmentation.repri import RePRIMixin, repri_regularizer
from lightning_reg.techniques.segmentation.self_adjusting_dice_loss import self_adjusting_dice_loss
from lightning_reg.techniques.segmentation.soft_dice_loss import soft_dice_loss
from lightning_reg.techniques.segmentation.tversky_loss import tversky_loss
from lightning_reg.testing import ContractCase
from lightning_reg.testing.host import SAMPLES, TensorItems
from lightning_reg.testing.hosts import ClassifierHost, DictBatchHost, ImageHost
from tests.contract.cases.contrastive import VIEWS, TwoViewHost

_BAD_COUNTS = [
    {"strength": -1.0},
    {"task": "binary"},
    {"classes": []},
    {"classes": [-1]},
    {"present_only": "yes"},
    {"ignore_index": 1.5},
]
_BAD_REGIONS = [*_BAD_COUNTS, {"over": "pixel"}, {"smooth": 0.0}]


def _of_counts(function, *args):
    def expected(probe):
        p = probe.logits.softmax(1)
        return function(p, F.one_hot(probe.targets, p.shape[1]).to(p), *args).mean()

    return expected


def _probabilities(function, *args):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(5, 3, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    labels = F.one_hot(torch.tensor([0, 1, 0, 2, 1]), 3).double()
    return lambda: (lambda p: function(p, labels, *args), (p.requires_grad_(),))


def _ranked_classes(probe):
    """One against the rest, by log odds."""
    log_p = probe.logits.log_softmax(1)
    odds = log_p - torch.log1p(-log_p.exp())
    values = [
        mann_whitney_loss(odds[probe.targets == c, c], odds[probe.targets != c, c], 0.5)
        for c in probe.targets.unique()
    ]
    return torch.stack(values).mean()


def _ranked_views(probe):
    z1, z2 = (F.normalize(probe.features[view], dim=1) for view in VIEWS)
    scores, same = z1 @ z2.T, torch.eye(len(z1), dtype=torch.bool)
    return mann_whitney_loss(scores[same], scores[~same], 0.1)


def _scores():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (4, 3)]
    return lambda a, b: mann_whitney_loss(a, b, 0.5), tuple(s.requires_grad_() for s in draw)


class BagHost(DictBatchHost):
    """Predicts four numbers of a sample, of which only the mean of each of five bags is known."""

    @staticmethod
    def dataset(options):
        """Inputs, responses and bags by name."""
        x = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))
        bag = torch.arange(SAMPLES) % 5
        single = torch.sin(x[:, :4] + x[:, 4:])
        y = torch.stack([single[bag == b].mean(0) for b in range(5)])[bag]
        if options.omit == "inputs":
            return TensorItems(("first", "second", "domain"), x, y, bag)
        fields = {"x": x, "y": y, "domain": bag}
        missing = {"targets": "y", "domain": "domain"}.get(options.omit)
        fields.pop(missing, None)
        return TensorItems(tuple(fields), *fields.values())


def _bags(probe):
    # The first batch, in order.
    return bag_instance_interpolation(probe.logits, probe.targets, probe.index % 5, 0.3)


def _predictions():
    generator = torch.Generator().manual_seed(0)
    f, y = torch.randn(2, 6, 2, dtype=torch.float64, generator=generator)
    bags = torch.tensor([0, 1, 0, 1, 1, 2])
    return lambda f: bag_instance_interpolation(f, y, bags, 0.3), (f.requires_grad_(),)


class ScoreHost(DictBatchHost):
    """Classifies samples into the level next to a score of 1 to 4."""

    @staticmethod
    def dataset(options):
        """Inputs, levels, scores, their deviations and two domains by name."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, 8, generator=generator)
        score = 1 + 3 * torch.rand(SAMPLES, generator=generator)
        spread = 0.3 + torch.rand(SAMPLES, generator=generator)
        level, domain = score.round().long() - 1, torch.arange(SAMPLES) % 2
        first, second = ("first", "second") if options.omit == "inputs" else ("x", "y")
        fields = {first: x, second: level, "score": score, "spread": spread, "domain": domain}
        fields.pop({"targets": "y", "domain": "domain"}.get(options.omit), None)
        return TensorItems(tuple(fields), *fields.values())


def _preferred(probe):
    batch = [ScoreHost.dataset(probe.module.options)[i] for i in probe.index.tolist()]
    score, spread, domain = (
        torch.stack([sample[key] for sample in batch]) for key in ("score", "spread", "domain")
    )
    mean, std = _mean_and_std(probe.logits, torch.arange(1.0, 5.0, dtype=probe.logits.dtype))
    losses = thurstone_fidelity_loss(mean, std, score.to(mean), spread.to(mean))
    pairs = (domain.unsqueeze(1) == domain) & ~torch.eye(len(mean), dtype=torch.bool)
    return losses[pairs].mean()


def _four(low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(4, dtype=torch.float64, generator=generator)


class ModalityHost(ClassifierHost):
    """The classifier, whose inputs are two modalities of four numbers each."""

    def build(self, options):
        """An identity for each modality."""
        super().build(options)
        self.left, self.right = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x):
        """Logits (B, 4)."""
        return super().forward(torch.cat([self.left(x[:, :4]), self.right(x[:, 4:])], 1))


class TransductiveHost(RePRIMixin, ClassifierHost):
    """The classifier, whose first class is also to be what four of its samples say of the rest."""

    def compute(self, batch):
        """Cross-entropy, and that of the rest with the fitted foreground."""
        x, y = self.split(batch)
        hidden = self.encoder(x)
        logits = self.head(self.dropout(hidden))
        loss = F.cross_entropy(logits, y)
        # The samples are the pixels of one task.
        support, query = (part.T[None, None] for part in (hidden[:4], hidden[4:]))
        found = self.repri_logits(support, (y[:4] == 0).long()[None, None], query).flatten()
        first = logits[4:, 0] - logits[4:, 1:].logsumexp(1)
        target = found.sigmoid().to(first)
        loss = loss + F.binary_cross_entropy_with_logits(first, target)
        return loss, {"logits": logits, "inputs": x, "targets": y}


def transductive_host(options, args):
    """The host with its settings."""
    host = TransductiveHost(options)
    host.set_repri(**args)
    return host


def _query():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    valid = torch.tensor([[1.0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).double()
    share = torch.tensor([0.3, 0.6]).double()
    return lambda z: repri_regularizer(z, valid, share, 2.0), (z,)


class Shaken(torch.nn.Module):
    """A policy that draws from torch's generator, as those of torchvision do."""

    def __init__(self, size: float):
        super().__init__()
        self.size = size

    def forward(self, image):
        """The image with noise."""
        return image + self.size * torch.randn(image.shape).to(image)

    def __eq__(self, other):
        return isinstance(other, Shaken) and self.size == other.size

    __hash__ = torch.nn.Module.__hash__


def _rows(function, *args):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    return lambda x: function(x, *args), (x,)


CASES = {
    "AugmentationPolicy": ContractCase(
        args={"policy": Shaken(0.5)},
        yaml={"policy": {"class_path": f"{__name__}.Shaken", "init_args": {"size": 0.5}}},
        neutral={"probability": 0.0},
        bad=[
            {"policy": "no_policy"},
            {"settings": {"magnitude": 9}},
            {"probability": 1.5},
            {"per": "pixel"},
            {"mean": [0.5]},
            {"mean": [0.5], "std": [0.0]},
        ],
        host=ImageHost,
        gradcheck=lambda: _rows(augmentation_policy, torch.sin, 1, torch.tensor([1, 0, 1])),
        logs=("reg/augmentation_policy",),
    ),
    "ManifoldMixup": ContractCase(
        args={"layers": ["encoder"], "include_inputs": False},
        neutral={"probability": 0.0},
        bad=[
            {"alpha": 0.0},
            {"layers": []},
            {"probability": 1.5},
            {"per": "pixel"},
            {"replaces": "all"},
        ],
        bad_late=[{"layers": ["no_such_layer"]}],
        gradcheck=lambda: _rows(
            manifold_mixup, torch.tensor([2, 0, 1]), torch.tensor([0.3, 1.0, 0.5])
        ),
        logs=("reg/manifold_mixup",),
    ),
    "RePRIMixin": ContractCase(
        args={"iterations": 12, "lr": 0.5},
        bad=[
            {"temperature": 0.0},
            {"lr": -1.0},
            {"iterations": 0},
            {"iterations": 1.5},
            {"update_at": [0]},
            {"divergence_weight": -1.0},
            {"entropy_weight": -1.0},
        ],
        host=ClassifierHost,
        mixin=transductive_host,
        gradcheck=_query,
        logs=(),
    ),
    "FunctionalEntropyRegularizer": ContractCase(
        args={"strength": 1e-4, "layers": ["left", "right"]},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"layers": []},
            {"sigma": 0.0},
            {"draws": 0},
            {"norm": 0.5},
            {"task": "binary"},
        ],
        bad_late=[{"layers": ["no_such_layer"]}],
        host=ModalityHost,
        gradcheck=lambda: (
            functional_entropy_regularizer,
            (_four(0.1, 2, 0).requires_grad_(), _four(0.5, 3, 1).view(2, 2).repeat(1, 2)),
        ),
    ),
    "ScoreDistributionSoftLabel": ContractCase(
        args={"strength": 0.8, "mean": "batch.score", "std": "batch.spread"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.1},
            {"mean": "score"},
            {"std": -1.0},
            {"score_range": [5.0, 1.0]},
            {"score_range": [1.0]},
            {"density": "mass"},
            {"min_std": -1.0},
            {"max_shift": -1.0},
            {"replaces": "all"},
        ],
        host=ScoreHost,
        gradcheck=lambda: (
            lambda mean, std: score_distribution_soft_label(
                mean, std, torch.arange(1.0, 6.0, dtype=torch.float64)
            ),
            (_four(2.2, 2.9, 0).requires_grad_(), _four(0.5, 0.8, 1).requires_grad_()),
        ),
    ),
    "ThurstoneFidelityLoss": ContractCase(
        args={
            "strength": 4.0,
            "true_mean": "batch.score",
            "true_std": "batch.spread",
            "groups": True,
        },
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"true_mean": "score"},
            {"true_std": -1.0},
            {"std": 0.0},
            {"score_range": [2.0, 2.0]},
        ],
        host=ScoreHost,
        expected=_preferred,
        gradcheck=lambda: (
            lambda mean, std: thurstone_fidelity_loss(mean, std, _four(1, 4, 2), _four(0, 1, 3)),
            (_four(1, 4, 0).requires_grad_(), _four(0.2, 1, 1).requires_grad_()),
        ),
    ),
    "BagInstanceInterpolation": ContractCase(
        args={"strength": 2.0, "rho": 0.3},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"rho": 1.1}, {"rho": -0.1}, {"task": "binary"}],
        host=BagHost,
        expected=_bags,
        gradcheck=_predictions,
    ),
    "MannWhitneyLoss": ContractCase(
        args={"strength": 2.0, "temperature": 0.5},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"temperature": 0.0},
            {"task": "binary"},
            {"classes": []},
            {"class_dim": "last"},
        ],
        expected=_ranked_classes,
        gradcheck=_scores,
    ),
    "MannWhitneyContrastive": ContractCase(
        args={"strength": 0.1, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[{"temperature": 0.0}, {"views": []}],
        bad_late=[{"views": "no_such_layer"}],
        host=TwoViewHost,
        expected=_ranked_views,
        gradcheck=_scores,
    ),
    "SoftDiceLoss": ContractCase(
        args={"strength": 4.0, "over": "batch"},
        neutral={"strength": 0.0},
        bad=_BAD_REGIONS,
        expected=_of_counts(soft_dice_loss),
        gradcheck=_probabilities(soft_dice_loss, 1.0, True),
    ),
    "TverskyLoss": ContractCase(
        args={"strength": 4.0, "over": "batch"},
        neutral={"strength": 0.0},
        bad=[*_BAD_REGIONS, {"alpha": -0.1}, {"beta": -0.1}, {"alpha": 0.0, "beta": 0.0}],
        expected=_of_counts(tversky_loss),
        gradcheck=_probabilities(tversky_loss),
    ),
    "SelfAdjustingDiceLoss": ContractCase(
        args={"strength": 4.0, "alpha": 0.5, "over": "position"},
        neutral={"strength": 0.0},
        bad=[*_BAD_REGIONS, {"alpha": -0.1}],
        expected=_of_counts(self_adjusting_dice_loss, 0.5),
        gradcheck=_probabilities(self_adjusting_dice_loss, 0.5, 1.0, True),
    ),
    "AnyLoss": ContractCase(
        args={"strength": 4.0, "metric": "mcc", "slope": 8.0},
        neutral={"strength": 0.0},
        bad=[*_BAD_COUNTS, {"metric": "auc"}, {"beta": 0.0}, {"slope": 0.0}],
        expected=_of_counts(any_loss, "mcc", 1.0, 8.0),
        gradcheck=_probabilities(any_loss, "g_mean", 1.0, 8.0),
    ),
}
