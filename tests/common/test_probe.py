"""Linear probes against scikit-learn's and against the normal equations."""

import numpy as np
import pytest
import torch

from common import probe

linear_model = pytest.importorskip("sklearn.linear_model")
D = 6


def data(n=150, outputs=3, seed=0):
    """Standardised features and noisy linear scores of several outputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    truth = torch.randn(D, outputs, generator=generator, dtype=torch.float64)
    return x, x @ truth + torch.randn(n, outputs, generator=generator, dtype=torch.float64) + 0.5


def logistic(x, y, c):
    model = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
    return model.fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("c", [1e-3, 1e-1, 10.0])
def test_classes_are_scikit_learn_s(c):
    x, z = data()
    y = z.argmax(1)
    weight, bias = probe.fit(x, y, 3, c)
    assert (weight.shape, bias.shape) == ((3, D), (3,))
    expected = logistic(x, y, c)
    np.testing.assert_allclose(weight, expected.coef_, atol=2e-5)
    # a shift of all biases changes nothing
    np.testing.assert_allclose(bias - bias.mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-5)


def test_a_class_that_train_does_not_have():
    x, z = data()
    y = z.argmax(1) * 2  # classes 0, 2 and 4 of five
    weight, bias = probe.fit(x, y, 5, 0.1)
    p = (x @ weight.T + bias).softmax(1)
    assert p[:, [1, 3]].max() < 1e-3
    np.testing.assert_allclose(p[:, [0, 2, 4]], logistic(x, y, 0.1).predict_proba(x.numpy()), atol=1e-3)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_a_score_is_ridge_regression(c):
    x, z = data()
    weight, bias = probe.fit_head(x, z[:, 0], score=True, several=False, outputs=1, c=c)
    middle, mean = x.mean(0), z[:, 0].mean()  # the bias is not penalised
    centred = x - middle
    solved = torch.linalg.solve(centred.T @ centred + torch.eye(D, dtype=x.dtype) / c, centred.T @ (z[:, 0] - mean))
    torch.testing.assert_close(weight[0], solved, rtol=0, atol=1e-6)
    torch.testing.assert_close(bias[0], mean - middle @ solved, rtol=0, atol=1e-6)


def test_several_labels_are_logistic_regressions_of_each():
    x, z = data(outputs=6)
    y = (z > torch.linspace(-1, 1, 6, dtype=z.dtype)).double()
    weight, bias = probe.fit_head(x, y, score=False, several=True, outputs=6, c=0.05)
    for i in range(6):
        expected = logistic(x, y[:, i], 0.05)
        np.testing.assert_allclose(weight[i], expected.coef_[0], atol=2e-5)
        np.testing.assert_allclose(bias[i], expected.intercept_[0], atol=2e-5)


def test_rows_of_unknown_target_are_left_out():
    x, z = data()
    lost = torch.arange(len(x)) % 4 == 0
    cases = [
        (z.argmax(1), -1, {"score": False, "several": False, "outputs": 3}),
        (z[:, 0], torch.nan, {"score": True, "several": False, "outputs": 1}),
        ((z > 0).double(), torch.nan, {"score": False, "several": True, "outputs": 3}),
    ]
    for y, unknown, kind in cases:
        target = y.clone()
        target[lost] = unknown
        weight, bias = probe.fit_head(x, target, **kind, c=0.1)
        expected_weight, expected_bias = probe.fit_head(x[~lost], y[~lost], **kind, c=0.1)
        assert torch.equal(weight, expected_weight)
        assert torch.equal(bias, expected_bias)
        assert not torch.allclose(weight, probe.fit_head(x, y, **kind, c=0.1)[0])
    # one unknown emotion makes a row unknown
    y = (z > 0).double()
    target = torch.where(lost[:, None] & (torch.arange(3) == 1), torch.nan, y)
    weight, _ = probe.fit_head(x, target, False, True, 3, 0.1)
    assert torch.equal(weight, probe.fit_head(x[~lost], y[~lost], False, True, 3, 0.1)[0])


def test_float32_features_are_solved_closely():
    """What evals.sentiment hands over is float32."""
    x, z = data(n=400)
    y = z.argmax(1)
    weight, bias = probe.fit(x.float(), y, 3, 0.1)
    expected = logistic(x, y, 0.1)
    p = (x.float() @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(p, expected.predict_proba(x.numpy()), atol=2e-3)
