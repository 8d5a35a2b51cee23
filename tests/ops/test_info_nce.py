"""info_nce against the formula written out row by row, and its kernels against the reference in float64."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cpc_ext.ops import info_nce
from cpc_ext.ops.info_nce import info_nce_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Shares of a gradient's largest value: float32 sums, or a rounding to the type of gradients and, on CUDA, of
# probabilities.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def problem(queries=6, keys=9, dim=4, batch=(), dtype=torch.float64, samples=5):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(*batch, queries, dim, generator=generator, dtype=dtype, requires_grad=True)
    k = torch.randn(*batch, keys, dim, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(keys, (*batch, queries), generator=generator)
    negatives = torch.randint(keys, (*batch, queries, samples), generator=generator)
    return q, k, targets, negatives


def by_formula(queries, keys, targets, negatives=None, scale=1.0, exclude=None):
    """Compute losses and hits of queries [M, D] and keys [N, D], row by row."""
    losses, rights = [], []
    for m, query in enumerate(queries):
        target = int(targets[m])
        contrasted = list(range(len(keys))) if negatives is None else [target, *negatives[m].tolist()]
        if exclude is not None:
            contrasted = [n for n in contrasted if n != int(exclude[m])]
        scores = torch.stack([scale * query @ keys[n] for n in contrasted])
        positive = scale * query @ keys[target]
        losses.append(-torch.log(positive.exp() / scores.exp().sum()))
        rights.append(float(all(positive > s for n, s in zip(contrasted, scores, strict=True) if n != target)))
    return torch.stack(losses), torch.tensor(rights, dtype=queries.dtype)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("implementation", [info_nce, info_nce_reference])
def test_equals_formula(implementation, sampled, excluding):
    queries, keys, targets, negatives = problem()
    negatives = negatives if sampled else None
    exclude = (targets + 2) % 9 if excluding else None

    loss, accuracy, _ = implementation(
        queries, keys, targets, negatives=negatives, scale=0.7, exclude=exclude, reduction="none"
    )
    expected_loss, expected_accuracy = by_formula(queries, keys, targets, negatives, 0.7, exclude)

    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(accuracy, expected_accuracy)
    actual = torch.autograd.grad(loss.sum(), (queries, keys))
    for one, other in zip(actual, torch.autograd.grad(expected_loss.sum(), (queries, keys)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_batch_entries_contrast_their_own_keys(sampled):
    queries, keys, targets, negatives = problem(batch=(2, 3))
    negatives = negatives if sampled else None
    loss, accuracy, rank = info_nce(queries, keys, targets, negatives=negatives, reduction="none")
    assert loss.shape == accuracy.shape == rank.shape == (2, 3, 6)
    for index in [(0, 0), (0, 2), (1, 1)]:
        one = info_nce(
            queries[index],
            keys[index],
            targets[index],
            negatives=negatives[index] if sampled else None,
            reduction="none",
        )
        torch.testing.assert_close(loss[index], one.loss)
        torch.testing.assert_close(accuracy[index], one.accuracy)


def test_default_targets_are_the_diagonal():
    queries, keys, _, _ = problem()
    torch.testing.assert_close(info_nce(queries, keys).loss, info_nce(queries, keys, torch.arange(6)).loss)


def test_reductions_and_weights():
    queries, keys, targets, _ = problem()
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    losses, rights = by_formula(queries, keys, targets)

    mean = info_nce(queries, keys, targets, weights=weights)
    torch.testing.assert_close(mean.loss, (weights * losses).sum() / weights.sum())
    torch.testing.assert_close(mean.accuracy, (weights * rights).sum() / weights.sum())
    assert not mean.accuracy.requires_grad
    total = info_nce(queries, keys, targets, weights=weights, reduction="sum")
    torch.testing.assert_close(total.loss, (weights * losses).sum())
    torch.testing.assert_close(total.accuracy, mean.accuracy)
    rows = info_nce(queries, keys, targets, weights=weights, reduction="none")
    torch.testing.assert_close(rows.loss, weights * losses)
    torch.testing.assert_close(rows.accuracy, rights)
    torch.testing.assert_close(info_nce(queries, keys, targets).loss, losses.mean())
    for contrast in (info_nce, info_nce_reference):  # Weights that sum to less than one.
        torch.testing.assert_close(contrast(queries, keys, targets, weights=weights / 16)[:2], mean[:2])


def test_ties_are_wrong_but_copies_of_the_positive_do_not_count():
    keys = torch.tensor([[1.0], [1.0], [0.0]])
    queries = torch.tensor([[1.0]])
    targets = torch.tensor([0])
    assert info_nce(queries, keys, targets).accuracy == 0
    output = info_nce(queries, keys, targets, negatives=torch.tensor([[0, 2]]))
    assert output.accuracy == 1
    torch.testing.assert_close(output.loss, torch.tensor(math.log(2 * math.e + 1) - 1))
    assert info_nce(torch.zeros(3, 1), torch.zeros(3, 1)).accuracy == 0


@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_by_finite_differences(sampled):
    queries, keys, targets, negatives = problem(3, 4, 2, samples=2)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    negatives = negatives if sampled else None
    assert torch.autograd.gradcheck(
        lambda q, k: info_nce(q, k, targets, negatives=negatives, weights=weights, scale=1.3).loss, (queries, keys)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampled", [False, True])
def test_half_precision_sums_in_float32(device, dtype, sampled):
    queries, keys, targets, negatives = (tensor.to(device) for tensor in problem(dim=64, dtype=torch.float32))
    queries, keys = (tensor.detach().to(dtype).requires_grad_() for tensor in (queries, keys))
    negatives = negatives if sampled else None
    output = info_nce(queries, keys, targets, negatives=negatives)
    exact = info_nce(queries.double(), keys.double(), targets, negatives=negatives)
    assert output.loss.dtype == output.accuracy.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), exact.loss, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert queries.grad.dtype == keys.grad.dtype == dtype


def test_different_dtypes_are_promoted():
    queries, keys, targets, _ = problem()
    assert info_nce(queries.float(), keys.bfloat16(), targets).loss.dtype == torch.float32
    assert info_nce(queries, keys.float(), targets).loss.dtype == torch.float64


@pytest.mark.parametrize("keys", [0, 4])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_queries(keys, sampled, reduction):
    queries = torch.zeros(0, 3, requires_grad=True)
    negatives = torch.zeros(0, 5, dtype=torch.int64) if sampled else None
    output = info_nce(queries, torch.zeros(keys, 3), negatives=negatives, reduction=reduction)
    assert output.loss.sum() == output.accuracy.sum() == 0
    output.loss.sum().backward()
    assert queries.grad.shape == (0, 3)


def test_empty_batch_and_no_negatives():
    assert info_nce(torch.zeros(0, 2, 3), torch.zeros(0, 4, 3), reduction="none").loss.shape == (0, 2)
    output = info_nce(torch.ones(2, 3), torch.ones(2, 3), negatives=torch.zeros(2, 0, dtype=torch.int32))
    assert output.loss == 0
    assert output.accuracy == 1


def test_large_scores_do_not_overflow():
    output = info_nce(torch.tensor([[1e4], [1e4]]), torch.tensor([[1e4], [-1e4]]))
    assert output.loss == 1e8
    assert output.accuracy == 0.5


# --- The kernels, on every device ---


class Drawn:
    """Arguments of one shape on a device, and their results by the reference in float64 on the CPU."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        *,
        samples: int | None = None,
        batch: tuple[int, ...] = (),
        spread: float = 1.0,
        plain: bool = False,
    ) -> None:
        num_queries, num_keys, dim = shape
        generator = torch.Generator().manual_seed(num_queries + 7 * num_keys + 13 * dim)
        rows = (*batch, num_queries)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        queries = (normal(*rows, dim) * spread * max(dim, 1) ** -0.5).to(dtype)
        keys = normal(*batch, num_keys, dim).to(dtype)
        options = {"scale": 0.7}
        targets = torch.randint(num_keys, rows, generator=generator)
        if not plain or num_queries > num_keys:
            options["targets"] = targets
        if not plain:
            options["weights"] = torch.rand(rows, generator=generator).mul(3).floor()
            if num_keys > 1:
                options["exclude"] = (targets + 1 + torch.randint(num_keys - 1, rows, generator=generator)) % num_keys
        if samples is not None:
            options["negatives"] = torch.randint(num_keys, (*rows, samples), generator=generator)
        self.exact = [tensor.double().requires_grad_() for tensor in (queries, keys)]
        self.exact_options = options
        self.inputs = [tensor.to(device).requires_grad_() for tensor in (queries, keys)]
        self.options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}

    def compare(self, reduction: str = "mean", loss_tolerance: float = 1e-5) -> None:
        dtype = self.inputs[0].dtype
        loss, accuracy, _ = info_nce(*self.inputs, **self.options, reduction=reduction)
        exact_loss, exact_accuracy, _ = info_nce_reference(*self.exact, **self.exact_options, reduction=reduction)
        precise = 1e-12 if dtype == torch.float64 else loss_tolerance
        torch.testing.assert_close(loss.double().cpu(), exact_loss, atol=precise, rtol=precise)
        torch.testing.assert_close(accuracy.double().cpu(), exact_accuracy, atol=1e-6, rtol=0)
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        actual = torch.autograd.grad(loss, self.inputs, upstream.to(loss))
        expected = torch.autograd.grad(exact_loss, self.exact, upstream)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == dtype
            largest = float(other.abs().max()) if other.numel() else 0.0
            torch.testing.assert_close(
                one.double().cpu(), other, atol=TOLERANCE[dtype] * max(largest, 1e-3), rtol=TOLERANCE[dtype]
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 17), (5, 2, 2), (17, 130, 65), (130, 65, 17), (65, 70, 8)], ids=str
)
def test_all_keys(device, dtype, shape):
    Drawn(device, dtype, shape).compare()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "samples"), [((1, 1, 1), 1), ((2, 5, 17), 2), ((17, 3, 65), 17), ((65, 9, 130), 5), ((5, 17, 2), 65)]
)
def test_sampled(device, dtype, shape, samples):
    Drawn(device, dtype, shape, samples=samples).compare()


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("plain", [False, True])
def test_batches_and_reductions(device, samples, reduction, plain):
    Drawn(device, torch.float32, (9, 11, 6), samples=samples, batch=(2, 3), plain=plain).compare(reduction)


@pytest.mark.parametrize("shape", [(400, 500, 70), (700, 3, 1030), (3, 700, 700), (390, 8300, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_queries_and_parts_of_keys(dtype, shape):
    Drawn(torch.device("cpu"), dtype, shape).compare()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.float16, 1030)])
def test_groups_of_queries_and_chunks_of_keys(monkeypatch, device, request, dtype, rows):
    """More keys, and more queries, than are scored at once."""
    monkeypatch.setenv("CPC_EMULATION_POWERS_KIB", "512")
    keys = {"cpu": 8200, "emulated": 600, "cuda": 140_000}[request.node.callspec.params["device"]]
    Drawn(device, dtype, (rows, keys, 2)).compare()


def test_queries_without_keys(device, request):
    queries, keys = torch.zeros(2, 3, device=device, requires_grad=True), torch.zeros(0, 3, device=device)
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    for negatives in (None, torch.zeros(2, 1, dtype=torch.int64, device=device)):
        if request.node.callspec.params["device"] == "cpu":
            with pytest.raises(IndexError, match="for 0 keys"):
                info_nce(queries, keys, targets, negatives=negatives)
        else:
            loss = info_nce(queries, keys, targets, negatives=negatives).loss
            assert loss.isnan()
            assert torch.autograd.grad(loss, queries)[0].isnan().all()


@pytest.mark.parametrize("samples", [None, 7])
@pytest.mark.parametrize("spread", [20.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores(device, dtype, spread, samples):
    """Softmaxes that are nearly one-hot, and scores of 10^4, whose own rounding is all the error that there is."""
    drawn = Drawn(device, dtype, (67, 90, 16), spread=spread, samples=samples)
    for tensor in (*drawn.inputs, *drawn.exact):  # Small multiples of powers of two: float32 scores are exact.
        tensor.data.mul_(8).round_().div_(8)
    drawn.options["scale"] = drawn.exact_options["scale"] = 1.0
    drawn.compare()


def test_small_losses_keep_their_precision(device):
    queries = torch.tensor([[12.0, 0.0], [0.0, 15.0]], device=device, requires_grad=True)
    keys = torch.eye(2, device=device)
    loss = info_nce(queries, keys, reduction="none").loss
    exact = torch.log1p(torch.exp(torch.tensor([-12.0, -15.0], dtype=torch.float64)))
    torch.testing.assert_close(loss.double().cpu(), exact, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), queries)
    share = -torch.sigmoid(torch.tensor([-12.0, -15.0], dtype=torch.float64))
    torch.testing.assert_close(gradient.diagonal().double().cpu(), share, rtol=1e-5, atol=0)


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_of_weights(device, samples, reduction):
    drawn = Drawn(device, torch.float32, (9, 11, 6), samples=samples)
    weights = drawn.options["weights"].float().requires_grad_()
    exact_weights = weights.detach().double().cpu().requires_grad_()
    loss = info_nce(*drawn.inputs, **drawn.options | {"weights": weights}, reduction=reduction).loss
    exact = info_nce_reference(
        *drawn.exact, **drawn.exact_options | {"weights": exact_weights}, reduction=reduction
    ).loss
    gradients = torch.autograd.grad(loss.sum() * 3, (weights, *drawn.inputs))
    exact_gradients = torch.autograd.grad(exact.sum() * 3, (exact_weights, *drawn.exact))
    for one, other in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("samples", [None, 4])
def test_one_gradient_at_a_time(device, samples):
    drawn = Drawn(device, torch.float32, (9, 11, 6), samples=samples)
    both = torch.autograd.grad(info_nce(*drawn.inputs, **drawn.options).loss, drawn.inputs)
    for i in range(2):
        inputs = [tensor.detach() for tensor in drawn.inputs]
        inputs[i].requires_grad_()
        (alone,) = torch.autograd.grad(info_nce(*inputs, **drawn.options).loss, inputs[i])
        assert torch.equal(alone, both[i])


@pytest.mark.parametrize("samples", [None, 40])
def test_same_bits_every_time(device, samples):
    def results() -> list[Tensor]:
        drawn = Drawn(device, torch.float32, (70, 67, 33), samples=samples)
        loss = info_nce(*drawn.inputs, **drawn.options, reduction="none").loss
        return [loss, *torch.autograd.grad(loss.sum(), drawn.inputs)]

    first = results()
    assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


@pytest.mark.parametrize(("samples", "batch"), [(None, ()), (None, (6,)), (40, ())])
def test_same_bits_for_any_number_of_threads(samples, batch):
    def results() -> list[Tensor]:
        drawn = Drawn(torch.device("cpu"), torch.float32, (500, 700, 70), samples=samples, batch=batch)
        loss = info_nce(*drawn.inputs, **drawn.options).loss
        return [loss, *torch.autograd.grad(loss, drawn.inputs)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(one, other) for one, other in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def peak_bytes(call) -> int:
    """Return the peak of bytes that PyTorch's CPU allocator has allocated during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("samples", [None, 16])
def test_memory_grows_with_queries_and_keys(samples):
    num_queries = num_keys = 4096
    dim = 256
    drawn = Drawn(torch.device("cpu"), torch.float32, (num_queries, num_keys, dim), samples=samples, plain=True)
    peak = peak_bytes(lambda: torch.autograd.grad(info_nce(*drawn.inputs, **drawn.options).loss, drawn.inputs))
    # The plain formulation holds three such matrices at its peak. The kernel's workspace is among what is counted.
    scores = 4 * num_queries * num_keys
    assert peak < 3 * scores / 10
    if samples is not None:
        assert peak < num_queries * (samples + 1) * dim * 4 / 2


def test_65536_queries_and_keys_in_a_gibibyte():
    """The matrix of their scores would take 16 GiB. Forward and one block of rows; the process's own peak tells."""
    code = (
        "import resource, torch\n"
        "from cpc_ext.ops import info_nce\n"
        "keys = torch.randn(65536, 128)\n"
        "queries = keys[:512].clone().requires_grad_()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "info_nce(queries, keys.requires_grad_(), scale=0.1).loss.backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20 / 4  # KiB


def test_infinite_and_undefined_scores(device):
    """As the formula has it, and no row spoils another's loss."""
    keys = torch.tensor([[1.0], [math.inf], [2.0], [math.nan]], device=device)
    queries = torch.ones(3, 1, device=device)
    targets = torch.tensor([0, 1, 2], device=device)
    contrasts = torch.tensor([[1, 2], [0, 2], [0, 0]], device=device)
    loss = info_nce(queries, keys, targets, negatives=contrasts, reduction="none").loss.cpu()
    assert loss[0] == math.inf
    assert loss[1].isnan()
    torch.testing.assert_close(loss[2], torch.tensor(math.log1p(2 * math.exp(-1))))
    everything = info_nce(queries, keys, targets, reduction="none")
    assert everything.loss.isnan().all()
    assert (everything.accuracy == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_scores_near_the_largest_number_and_beyond(device, request, dtype, gradients):
    """Those of 3e38 are numbers still, and one that is infinite makes its row's loss so."""

    def losses(queries, keys, targets):
        tensors = [torch.tensor(values, dtype=dtype, device=device).unsqueeze(1) for values in (queries, keys)]
        tensors[1].requires_grad_(gradients)
        return info_nce(*tensors, torch.tensor(targets, device=device), reduction="none").loss.detach().cpu().double()

    loss = losses([2.0, 2.0, -2.0], [1.5e38, 1.5e38, -1.5e38, 1.0], [0, 3, 2])
    large = torch.tensor(1.5e38, dtype=dtype).item() * 2
    expected = torch.tensor([math.log(2), large, 0], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss = losses([1.0, 1.0], [math.inf, 1.0], [1, 0])
    if request.node.callspec.params["device"] == "cpu" or dtype != torch.float32:
        assert loss[0] == math.inf
    else:  # Products of float32 are sums of three there, of parts that an infinite value does not have.
        assert not loss[0].isfinite()
    assert loss[1].isnan()


def test_negatives_that_are_left_out_learn_nothing_of_a_row_without_a_finite_loss(device):
    keys = torch.tensor([[1.0, 0.0], [math.inf, 0.0], [2.0, 0.0]], device=device, requires_grad=True)
    queries, targets = torch.ones(1, 2, device=device), torch.tensor([0], device=device)
    negatives, left_out = torch.tensor([[1, 2]], device=device), torch.tensor([[2]], device=device)
    loss = info_nce(queries, keys, targets, negatives=negatives, exclude=left_out).loss
    (gradient,) = torch.autograd.grad(loss, keys)
    assert loss == math.inf
    assert gradient[:2].isnan().any(1).all()
    assert gradient[2].cpu().tolist() == [0, 0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("of", ["positive", "rival"])
def test_gradients_of_infinite_scores_are_no_numbers(device, of, sampled, symmetric):
    """What watches gradients for overflow, such as a GradScaler, sees that of a loss that is not finite."""
    if sampled and symmetric:
        return
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(100, 8, generator=generator), torch.randn(100, 8, generator=generator)
    keys[:, 3] = -1
    keys[70 if of == "positive" else 20, 3] = 1
    queries[70, 3] = torch.inf  # The other scores are -inf.
    leaves = [tensor.to(device).requires_grad_() for tensor in (queries, keys)]
    negatives = torch.arange(100, device=device).repeat(100, 1) if sampled else None
    loss = info_nce(*leaves, negatives=negatives, symmetric=symmetric, reduction="none").loss
    of_queries, of_keys = torch.autograd.grad(loss.sum(), leaves)
    there = torch.arange(100) != 70
    if not symmetric:
        assert loss.isfinite().cpu().equal(there)
        assert of_queries.isfinite().all(1).cpu().equal(there)
    assert not loss[70].isfinite()
    assert of_queries[70].isnan().all()
    assert not of_keys[70 if of == "positive" else 20].isfinite().all()


@pytest.mark.parametrize("name", ["targets", "negatives", "exclude"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("value", [-2, 11, 2**62, -(2**63)])
def test_indices_that_name_no_key(device, request, name, sampled, value):
    """An IndexError on the CPU. Elsewhere the query's loss and gradient are NaN, and other queries do not notice."""
    if name == "negatives" and not sampled:
        return
    drawn = Drawn(device, torch.float32, (9, 11, 6), samples=3 if sampled else None)
    wrong = {key: tensor.clone() if isinstance(tensor, Tensor) else tensor for key, tensor in drawn.options.items()}
    wrong[name].view(9, -1)[4, -1] = value
    if request.node.callspec.params["device"] == "cpu":
        with pytest.raises(IndexError, match=rf"{name} must be in 0\.\.10 for 11 keys"):
            info_nce(*drawn.inputs, **wrong)
        return
    good = torch.arange(9, device=device) != 4
    drawn.options["weights"] = wrong["weights"] = torch.ones(9, device=device) + good
    loss, accuracy, rank = info_nce(*drawn.inputs, **wrong, reduction="none")
    expected, _, expected_rank = info_nce(*drawn.inputs, **drawn.options, reduction="none")
    assert loss[4].isnan()
    assert accuracy[4] == 0
    assert rank[4] == -1
    assert torch.equal(loss[good], expected[good])
    assert torch.equal(rank[good], expected_rank[good])
    queries, keys = torch.autograd.grad(loss.sum(), drawn.inputs)
    expected_queries, expected_keys = torch.autograd.grad(expected[good].sum(), drawn.inputs)
    assert queries[4].isnan().all()
    torch.testing.assert_close(queries[good], expected_queries[good])
    torch.testing.assert_close(keys, expected_keys)


# --- As an op of PyTorch ---


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(samples, reduction):
    drawn = Drawn(torch.device("cpu"), torch.float32, (9, 11, 6), samples=samples, batch=(2,))

    def contrast(queries, keys, **tensors):
        loss, *others = info_nce(queries * 2, keys, scale=0.7, reduction=reduction, **tensors)
        return loss.sum(), *others

    tensors = {name: value for name, value in drawn.options.items() if name != "scale"}
    torch._dynamo.reset()
    compiled = torch.compile(contrast, fullgraph=True, backend="aot_eager")
    expected, *others = contrast(*drawn.inputs, **tensors)
    loss, *compiled_others = compiled(*drawn.inputs, **tensors)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(compiled_others, others)
    for one, other in zip(
        torch.autograd.grad(loss, drawn.inputs), torch.autograd.grad(expected, drawn.inputs), strict=True
    ):
        torch.testing.assert_close(one, other)
    wrong = tensors | {"targets": tensors["targets"] + 11}
    with pytest.raises(IndexError, match="targets must be in"):
        compiled(*drawn.inputs, **wrong)


@pytest.mark.parametrize("samples", [None, 3])
def test_autocast_rounds_what_is_multiplied(device, samples):
    drawn = Drawn(device, torch.float32, (9, 11, 6), samples=samples)
    with torch.autocast(device.type, torch.bfloat16):
        loss = info_nce(*drawn.inputs, **drawn.options).loss
    # The order of the sums depends on which gradients are needed.
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in drawn.inputs]
    assert loss.dtype == torch.float32
    assert loss == info_nce(*rounded, **drawn.options).loss
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(loss, drawn.inputs))


def test_float16_gradients_survive_a_mean():
    """A GradScaler multiplies the loss, not what the forward pass has formed."""
    drawn = Drawn(torch.device("cpu"), torch.float16, (4096, 64, 8), plain=True)
    loss = info_nce(*drawn.inputs, **drawn.options).loss
    gradient = torch.autograd.grad(loss * 2.0**16, drawn.inputs)[0].double() / 2**16
    exact = torch.autograd.grad(info_nce_reference(*drawn.exact, **drawn.exact_options).loss, drawn.exact)[0]
    torch.testing.assert_close(gradient, exact, rtol=2**-9, atol=2.0**-10 * float(exact.abs().max()))


def test_backward_twice(device):
    drawn = Drawn(device, torch.float32, (9, 11, 6))
    loss = info_nce(*drawn.inputs, **drawn.options).loss
    first = torch.autograd.grad(loss, drawn.inputs, retain_graph=True)
    second = torch.autograd.grad(loss, drawn.inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_derivatives_beyond_the_first():
    drawn = Drawn(torch.device("cpu"), torch.float64, (3, 4, 2))
    loss = info_nce(*drawn.inputs, **drawn.options).loss
    (gradient,) = torch.autograd.grad(loss, drawn.inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce has no second derivatives"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(drawn.inputs[0].detach(), torch.ones(3, 2, dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            info_nce(dual, drawn.inputs[1])


@pytest.mark.parametrize("contrast", ["one way", "several positives", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_all_keys_have_in_common_is_not_in_the_gradients(device, dtype, contrast):
    """Weights that are rounded to multiply them still come to zero in every row.

    A softmax does not depend on what is added to all keys, so that nothing holds it back: where the gradient has some
    of it, in every row alike, it grows without bounds. Encoders without norm at their end make such keys.
    """
    generator = torch.Generator().manual_seed(0)
    rows, dim = 192, 64
    common = 16 * torch.randn(dim, generator=generator)
    queries = torch.randn(rows, dim, generator=generator) / 16
    queries = (queries + queries.mean(1, keepdim=True)).to(dtype)
    keys = (common + torch.randn(rows, dim, generator=generator)).to(dtype)
    options = {}
    if contrast == "several positives":
        options["targets"] = torch.stack([torch.arange(rows), (torch.arange(rows) + 7) % rows], 1).to(device)
    elif contrast == "sampled":
        later = torch.randint(1, rows, (rows, 16), generator=generator)
        options["negatives"] = ((torch.arange(rows)[:, None] + later) % rows).to(device)

    def gradients(dtype):
        inputs = [each.to(device, dtype).requires_grad_() for each in (queries, keys)]
        return [each.double().cpu() for each in torch.autograd.grad(info_nce(*inputs, **options).loss, inputs)]

    (of_queries, of_keys), (exact, _) = gradients(dtype), gradients(torch.float64)
    left = (of_queries - exact) @ (common.double() / common.norm()) / exact.norm(dim=1).mean()
    assert left.mean().abs() < 4e-4
    assert left.abs().max() < 0.02
    # Nor do all keys move together.
    assert of_keys.sum(0).norm() < 4e-4 * of_keys.norm(dim=1).sum()
