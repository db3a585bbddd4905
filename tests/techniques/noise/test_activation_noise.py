"""Noise on activations, weights and inputs: means, variances, limits, and what it regularizes."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    DropBlock,
    FeatureNoise,
    ModalityDropout,
    NestedDropout,
    WeightNoise,
    ZeroImputeMask,
)
from lightning_reg.engine import IndexedDataset, RegularizationError
from lightning_reg.functional import (
    block_rate,
    drop_block,
    feature_noise,
    inverted_dropout,
    kept_modalities,
    length_probabilities,
    nested_dropout,
    truncation_accuracy,
    zero_impute_mask,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- dropout and noise


def test_gaussian_dropout_has_the_moments_of_dropout():
    p, h = 0.4, torch.full((400_000,), 3.0)
    sigma = (p / (1 - p)) ** 0.5
    noise = torch.randn(h.shape, generator=_generator())
    gaussian = feature_noise(h, noise, sigma, "multiplicative")
    mask = (torch.rand(h.shape, generator=_generator(1)) >= p).float()
    binary = inverted_dropout(h, mask, p)
    # Four standard errors of means of 400,000 draws with a deviation of 3 sigma.
    error = 4 * 3 * sigma / 400_000**0.5
    assert gaussian.mean().item() == pytest.approx(3.0, abs=error)
    assert binary.mean().item() == pytest.approx(3.0, abs=error)
    assert gaussian.var().item() == pytest.approx(binary.var().item(), rel=0.02)


def test_additive_noise_adds_half_the_trace_of_the_hessian():
    """For a quadratic loss exactly, in the mean: E L(h + s e) - L(h) = s^2 / 2 tr H."""
    curvature = torch.tensor([[2.0, 0.5], [0.5, 3.0]], dtype=torch.float64)
    h = torch.tensor([0.3, -0.7], dtype=torch.float64)
    noise = torch.randn(200_000, 2, generator=_generator(), dtype=torch.float64)
    noise = torch.cat([noise, -noise])  # The linear term cancels.
    noisy = feature_noise(h.expand_as(noise), noise, 0.5)
    rise = 0.5 * ((noisy @ curvature) * noisy).sum(1).mean() - 0.5 * h @ curvature @ h
    assert rise.item() == pytest.approx(0.5 * 0.25 * 5.0, rel=0.02)


def test_validation_sees_no_noise():
    seen = []

    class Watching(Host):
        def validation_step(self, batch, batch_idx):
            seen.append(torch.equal(self(batch[0]), self.net(batch[0])))
            self.train_like = self(batch[0])

    module = Watching()
    run = trainer([FeatureNoise(1.0, layers="net.2")], max_epochs=1)
    run.fit(module, loader(), loader())
    assert all(seen)
    assert seen


def test_weight_noise_is_one_draw_for_all_ranks_and_micro_batches(ranks):
    for accumulate in (1, 2):
        one, other = ranks.run(noised_weights, accumulate)
        assert torch.equal(one, other)
        assert torch.equal(one[0], one[-1]) == (accumulate == 2)


def noised_weights(accumulate):
    seen = []

    class Watching(Host):
        def training_step(self, batch, batch_idx):
            seen.append(self.net[0].weight.detach().clone())
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    run = rank_trainer(
        callbacks=[WeightNoise(0.5)], max_steps=2 // accumulate, accumulate_grad_batches=accumulate
    )
    run.fit(Watching(), loader(8))
    return torch.stack(seen)


def test_relative_weight_noise_has_the_size_that_was_asked():
    technique = WeightNoise(0.3, scale="rms")
    weight = 5 * torch.randn(300, 200, generator=_generator())
    noisy = technique.noisy_weights({"w": weight}, 0.3, _generator(1))["w"]
    ratio = (noisy - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    # Four standard errors of a deviation from 60,000 draws.
    assert ratio.item() == pytest.approx(0.3, abs=4 * 0.3 / 120_000**0.5)


# ---------------------------------------------------------------------- blocks


def test_a_seed_drops_its_block_and_the_rest_keeps_the_mean():
    features = torch.ones(1, 1, 5, 6)
    seeds = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    seeds[0, 0, 1, 2] = True
    found = drop_block(features, seeds, 3)
    expected = torch.ones(5, 6)
    expected[1:4, 2:5] = 0
    torch.testing.assert_close(found[0, 0], expected * 30 / 21)


def test_blocks_of_one_are_dropout_on_maps():
    features = torch.randn(2, 3, 4, 4, generator=_generator())
    seeds = torch.rand(2, 3, 4, 4, generator=_generator(1)) < 0.3
    expected = features * ~seeds * (seeds.numel() / (~seeds).sum())
    torch.testing.assert_close(drop_block(features, seeds, 1), expected)
    assert block_rate(0.3, 1, 4, 4) == pytest.approx(0.3)


def test_rate_drops_the_asked_share_where_blocks_are_rare():
    p, size = 0.01, 3
    rate = block_rate(p, size, 40, 40)
    seeds = torch.rand(1000, 1, 38, 38, generator=_generator()) < rate
    kept = drop_block(torch.ones(1000, 1, 40, 40), seeds, size) > 0
    # 1,800 blocks: four standard errors are 9 %.
    assert 1 - kept.float().mean().item() == pytest.approx(p, rel=0.09)


def test_all_dropped_is_zero_and_finite():
    found = drop_block(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1).bool(), 3)
    assert torch.equal(found, torch.zeros(1, 1, 3, 3))


def test_other_outputs_than_maps_are_named():
    with pytest.raises(RegularizationError, match=r"feature maps \(B, C, H, W\), got \(16, 16\)"):
        fit([DropBlock(0.1, layers="net.0")], max_steps=1)


# ---------------------------------------------------------------------- nested dropout


def test_lengths_are_drawn_as_in_the_official_code():
    # yingyichen-cyy/Nested-Co-teaching@9a2fc40, nested/train_resnet.py, GaussianDist.
    expected = np.array([np.exp(-(((i - 2) / 3.0) ** 2)) for i in range(1, 8)])
    found = length_probabilities(7, 3.0, 2.0)
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(), rtol=1e-12)
    assert length_probabilities(5, None).tolist() == [0.2] * 5


def test_gradient_reaches_the_first_units_only():
    features = torch.ones(2, 4, 3, requires_grad=True)
    nested_dropout(features, torch.tensor([1, 3])).sum().backward()
    assert features.grad[:, :, 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_linear_autoencoder_finds_the_principal_components_in_their_order():
    """Rippel et al.: the optimum orders the units; without it only the subspace is found."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    scale = np.array([4.0, 2.5, 1.6, 1.0, 0.6, 0.3])
    data = torch.tensor(rng.normal(size=(512, 6)) * scale @ basis.T, dtype=torch.float64)
    torch.manual_seed(0)
    encoder, decoder = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in "ed")
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 0.02)
    weights = length_probabilities(6, None)
    for step in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 1200)
        optimizer.zero_grad()
        code = encoder(data)
        # All lengths, weighted, in place of draws: the expectation that draws estimate.
        loss = sum(
            w * (decoder(nested_dropout(code, torch.tensor(k + 1))) - data).square().sum(1).mean()
            for k, w in enumerate(weights)
        )
        loss.backward()
        optimizer.step()
    _, _, right = np.linalg.svd(data.numpy(), full_matrices=False)
    columns = decoder.weight.detach().numpy()
    for k in range(1, 4):
        found, _ = np.linalg.qr(columns[:, :k])
        cosines = np.linalg.svd(found.T @ right[:k].T, compute_uv=False)
        assert cosines.min() > np.cos(np.radians(3))


def test_truncated_accuracy_is_that_of_the_truncated_head():
    head = nn.Linear(6, 3)
    features = torch.randn(50, 6, generator=_generator())
    targets = torch.randint(0, 3, (50,), generator=_generator(1))
    found = truncation_accuracy(features, targets, head)
    for k in range(1, 7):
        cut = nested_dropout(features, torch.tensor(k))
        assert found[k - 1] == (head(cut).argmax(1) == targets).sum()


def test_truncated_accuracy_of_two_networks_is_that_of_their_summed_logits():
    heads = [nn.Linear(6, 3), nn.Linear(6, 3)]
    features = list(torch.randn(2, 50, 6, generator=_generator()))
    targets = torch.randint(0, 3, (50,), generator=_generator(1))
    found = truncation_accuracy(features, targets, heads)
    for k in range(1, 7):
        cuts = [nested_dropout(part, torch.tensor(k)) for part in features]
        said = (heads[0](cuts[0]) + heads[1](cuts[1])).argmax(1)
        assert found[k - 1] == (said == targets).sum()
    technique = NestedDropout(layer="net.2")
    assert technique.select_length([(features, targets)], heads) == int(found.argmax()) + 1


def test_best_length_cuts_validation_test_and_prediction_and_is_saved(tmp_path):
    technique = NestedDropout(layer="net.2")
    # Noise behind the third unit, which decides alone.
    features = torch.randn(200, 16, generator=_generator())
    head = nn.Linear(16, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, 2], head.weight[1, 2], head.bias[:] = 1.0, -1.0, 0.0
        head.weight[:, 5:] = 5 * torch.randn(2, 11, generator=_generator(1))
    targets = (features[:, 2] < 0).long()
    assert (
        technique.select_length(
            [(features[:120], targets[:120]), (features[120:], targets[120:])], head
        )
        == 3
    )
    module = Host()
    run = trainer([technique], max_epochs=1)
    predicted = torch.cat(run.predict(module, DataLoader(INPUTS, 16)))
    hidden = module.net[:3](INPUTS)
    expected = module.net[4](nested_dropout(hidden, torch.tensor(3)))
    torch.testing.assert_close(predicted, expected)
    assert not module.net[2]._forward_hooks
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    fresh = NestedDropout(layer="net.2")
    trainer([fresh], max_epochs=1).fit(
        Host(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False
    )
    assert fresh.best_length == 3


# ---------------------------------------------------------------------- modalities


def test_a_sample_keeps_one_modality():
    draw = torch.rand(5000, 2, generator=_generator())
    kept = kept_modalities(draw, 0.7, keep_one=True)
    assert kept.any(1).all()
    assert not kept_modalities(draw, 0.7, keep_one=False).any(1).all()
    # What would be lost entirely goes to one of the two: 0.3 + 0.49 / 2.
    assert kept.float().mean().item() == pytest.approx(0.3 + 0.245, abs=0.02)


class TwoModalities(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 8)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        parts = [self.first(x[:, :4]).relu(), self.second(x[:, 4:]).relu()]
        return self.head(torch.cat(parts, 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)


def _without_first(module, x, y):
    with torch.no_grad():
        parts = [torch.zeros(len(x), 8), module.second(x[:, 4:]).relu()]
        return (module.head(torch.cat(parts, 1)).argmax(1) == y).float().mean().item()


def test_the_weaker_modality_is_learned_beside_the_perfect_one():
    """The second modality alone is right in 85 % of cases; undropped, the first hides it."""
    generator = _generator()
    y = torch.randint(0, 2, (2000,), generator=generator)
    sign = (2.0 * y - 1).unsqueeze(1)
    flipped = torch.where(torch.rand(2000, 1, generator=generator) < 0.15, -sign, sign)
    # It takes more than a linear reading: the product of two signs.
    one = 2.0 * torch.randint(0, 2, (2000, 1), generator=generator) - 1
    x = torch.cat([5 * sign.expand(-1, 4), one, one * flipped, one, one * flipped], 1)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    found = {}
    for p in (0.0, 0.5):
        module = TwoModalities()
        data = DataLoader(TensorDataset(x, y), batch_size=100)
        trainer([ModalityDropout(p, layers=["first", "second"])], max_epochs=8).fit(module, data)
        found[p] = _without_first(module, x, y)
    assert found[0.5] == pytest.approx(0.85, abs=0.03)
    # Chance; 0.49 and 0.51 over three seeds.
    assert found[0.0] == pytest.approx(0.5, abs=0.06)


# ---------------------------------------------------------------------- inputs


def test_zero_imputation_is_the_ridge_of_the_paper():
    """Least squares on all masks of a small problem, enumerated, equals the closed form."""
    rng = np.random.default_rng(0)
    x, y, rho = rng.normal(size=(40, 3)), rng.normal(size=40), 0.7
    rows, targets, weights = [], [], []
    for bits in range(8):
        mask = np.array([(bits >> j) & 1 for j in range(3)])
        masked = zero_impute_mask(torch.tensor(x), torch.tensor(mask).bool().expand(40, 3))
        rows.append(masked.numpy())
        targets.append(y)
        share = rho ** mask.sum() * (1 - rho) ** (3 - mask.sum())
        weights.append(np.full(40, share))
    a, b, w = np.concatenate(rows), np.concatenate(targets), np.concatenate(weights)
    theta = np.linalg.solve(a.T @ (w[:, None] * a), a.T @ (w * b))
    # In beta = rho theta: ridge with (1 - rho) / rho on the second moments.
    moments = np.diag((x**2).sum(0))
    beta = np.linalg.solve(x.T @ x + (1 - rho) / rho * moments, x.T @ y)
    np.testing.assert_allclose(rho * theta, beta, rtol=1e-10)


def test_fixed_masks_belong_to_samples():
    seen = {}

    class Watching(Host):
        def training_step(self, batch, batch_idx):
            for row in batch[0]:
                key = tuple(row[row != 0].tolist())
                seen.setdefault(self.current_epoch, []).append(tuple((row != 0).tolist()) + key)
            return super().training_step(batch, batch_idx)

    data = IndexedDataset(TensorDataset(INPUTS, LABELS))
    run = trainer([ZeroImputeMask(0.4, fixed=True)], max_epochs=2)
    run.fit(Watching(), DataLoader(data, batch_size=16, shuffle=True))
    assert sorted(seen[0]) == sorted(seen[1])
    fresh = trainer([ZeroImputeMask(0.4)], max_epochs=2)
    seen.clear()
    fresh.fit(Watching(), DataLoader(TensorDataset(INPUTS, LABELS), batch_size=16))
    assert sorted(seen[0]) != sorted(seen[1])
