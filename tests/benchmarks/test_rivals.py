"""The rivals of training steps compute the same results as ours, or as the plain rival."""

import pytest
import torch
from speech_rivals import BatchedCPCAudioRival, CPCAudioRival, GreedyRival
from training import make_model, plain_ops


def test_the_plain_formulas_have_our_loss_and_gradients():
    model = make_model(torch.device("cpu"), channels_last=False)
    patches = torch.randn(3, 7, 7, 1, 16, 16)

    def step():
        torch.manual_seed(1)
        made = model(patches)
        return made.loss, made.accuracy, *torch.autograd.grad(made.loss, list(model.parameters()))

    ours = step()
    with plain_ops():
        plain = step()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)


def test_negatives_that_all_steps_share_are_scored_at_once_alike():
    plain, batched = CPCAudioRival(16, 5), BatchedCPCAudioRival(16, 5)
    batched.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, batched):
        torch.manual_seed(1)
        loss = model(torch.randn(2, 1, 160 * 30))
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rival", [CPCAudioRival, BatchedCPCAudioRival])
def test_labels_are_where_the_scores_are(rival):
    assert rival(16, 5).to("meta")(torch.empty(2, 1, 160 * 30, device="meta")).is_meta


@pytest.mark.parametrize("end_to_end", [False, True])
def test_losses_of_modules_add_up(end_to_end):
    model = GreedyRival(end_to_end=end_to_end, subsample=None, channels=8, context=4)
    waveforms = torch.randn(2, 1, 160 * 30)
    torch.manual_seed(1)
    whole = model(waveforms)
    torch.manual_seed(1)
    torch.testing.assert_close(sum(model.each_loss(waveforms)), whole)
