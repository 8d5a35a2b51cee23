"""CPC_audio's probes of phones and speakers, reproduced from their weights."""

import torch
from torch.autograd import grad

from cpc_ext.measures.frame_probe import FrameClassifier, sequence_loss, summary_of_frames

EXACT = {"atol": 1e-10, "rtol": 0}


def classifier(problem, name, dim, classes, **options):
    """Ours with the program's weights, in the order of its layers."""
    model = FrameClassifier(dim, classes, **options).double()
    values = problem.state(f"state.{name}.").values()
    ours = dict(model.named_parameters())
    # Both have a layer's bias before its weight in alphabetical order.
    assert [value.shape for value in values] == [ours[key].shape for key in sorted(ours)]
    model.load_state_dict(dict(zip(sorted(ours), values, strict=True)))
    return model


def check(problem, name, model, loss, logits, labels):
    tensors = problem.tensors
    torch.testing.assert_close(loss.view(1, 1), tensors[f"{name}.loss"], **EXACT)
    if f"{name}.accuracy" in tensors:
        right = (logits.argmax(-1) == labels).double().mean().view(1, 1)
        torch.testing.assert_close(right, tensors[f"{name}.accuracy"], **EXACT)
    expected = problem.state(f"grad.{name}.").values()
    parameters = dict(model.named_parameters())
    if expected:
        for ours, theirs in zip(grad(loss, [parameters[key] for key in sorted(parameters)]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


def test_phones(golden):
    problem = golden("cpc_audio.probes")
    features, labels = problem.tensors["phone.features"], problem.tensors["phone.labels"]
    for name, hidden in (("phone", 0), ("phone2", 9)):
        model = classifier(problem, name, 12, 9, hidden=hidden)
        check(problem, name, model, model.loss(features, labels), model(features), labels)


def test_sequences_of_phones(golden):
    problem = golden("cpc_audio.probes")
    features, labels = problem.tensors["phone.features"], problem.tensors["ctc.labels"]
    model = classifier(problem, "ctc", 12, 10)
    check(problem, "ctc", model, sequence_loss(model(features), labels), None, labels)


def test_speakers(golden):
    problem = golden("cpc_audio.probes")
    labels = problem.tensors["speaker.labels"]
    last = torch.stack([summary_of_frames(frames, "last") for frames in problem.tensors["phone.features"]])
    model = classifier(problem, "speaker", 12, 5)
    check(problem, "speaker", model, model.loss(last, labels), model(last), labels)
