"""MoCo: the loss's parts, gradients of the query networks and updates of the key networks, and learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.models import MoCo, ResNetV2Encoder


def make(**options):
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(blocks=(1, 1), channels=(4, 8), stem_channels=4, norm="layer", stem="cifar")
    return MoCo(encoder, **{"projection_channels": 6, "queue_size": 12, **options})


def views(images=5, seed=1):
    return torch.randn(2, images, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def test_loss_and_accuracy_are_those_of_queries_keys_and_queue():
    model, batch = make(temperature=0.4), views()
    with torch.no_grad():
        model.key_head[0].weight += 0.3  # Others than the queries' weights.
    queue = model.objective.queue.keys[:12].clone()
    output = model(batch)
    queries = F.normalize(model.head(model.encode(batch[0])), dim=1)
    keys = F.normalize(model.key_head(model.key_encoder(batch[1][:, None, None]).mean((2, 3))), dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.4
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)))
    assert output.accuracy.item() == pytest.approx((logits.argmax(1) == 0).float().mean().item())
    torch.testing.assert_close(model.objective.queue.keys[:5], keys)
    assert torch.equal(model.objective.queue.keys[5:12], queue[5:])


def test_keys_follow_and_get_no_gradient():
    model = make(momentum=0.75)
    model(views()).loss.backward()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in learning} == {"encoder", "head"}
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in learning)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for part in (model.encoder, model.head):
            for parameter in part.parameters():
                parameter += 1
    model.follow()
    for name, parameter in model.named_parameters():
        moved = 1 if name in learning else 0.25
        torch.testing.assert_close(parameter.detach(), before[name] + moved)


def test_the_loss_falls():
    """Colours are new every time and views differ little: those of one batch would soon be their own negatives."""
    model = make(momentum=0.9, temperature=0.2, queue_size=20)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    losses = []
    for number in range(60):
        optimizer.zero_grad()
        noise = views(seed=number)
        colours = 3 * noise[:1, :, :, :1, :1]
        output = model(colours + 0.1 * noise)
        output.loss.backward()
        optimizer.step()
        model.follow()
        losses.append(output.loss.item())
    # The queue is filled with keys after four updates.
    assert sum(losses[-10:]) < 0.85 * sum(losses[5:15])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        make(momentum=1)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        make(head={"layers": 0})
    with pytest.raises(ValueError, match=r"views must be \[2, B, C, H, W\], got \(5, 3, 10, 10\)"):
        make()(views()[0])
