"""Losses and gradients against plain loops, and two ranks against one."""

import math

import pytest
import torch
from gloo import on_two_ranks
from torch import nn

from vidl.masking import uniform
from vidl.objectives import (
    ContrastiveLoss,
    MaskedPatchLoss,
    Negatives,
    gather_with_gradient,
    hard_negatives,
    masked_word_loss,
    matching_loss,
)

B, T, C = 6, 3, 5
CLIPS = torch.tensor([4, 7, 4, 9, 1, 7])


def features(frames=True, dtype=torch.float64):
    video = torch.randn(B, T, C, dtype=dtype) if frames else torch.randn(B, C, dtype=dtype)
    return video.requires_grad_(), torch.randn(B, C, dtype=dtype, requires_grad=True)


def plain_contrast(video, text, temperature, clip_ids=None, form="mean"):
    """The formula, element by element."""
    frames = video[:, None] if video.ndim == 2 else video
    clip_ids = list(range(len(text))) if clip_ids is None else clip_ids.tolist()
    total = 0
    for by in ("video", "text"):
        for i in range(len(text)):
            scores = []
            for j in range(len(text)):
                clip, caption = (i, j) if by == "video" else (j, i)
                cosines = [torch.cosine_similarity(f, text[caption], 0) for f in frames[clip]]
                scores.append(sum(cosines) / len(cosines) / temperature)
            log = torch.stack(scores).log_softmax(0)
            same = [j for j in range(len(text)) if clip_ids[j] == clip_ids[i]]
            total = total - sum(log[j] for j in same) / len(same)
    return total / len(text) / (2 if form == "mean" else 1)


@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize("clip_ids", [None, CLIPS], ids=["distinct", "shared"])
def test_contrastive_loss_equals_a_plain_loop(frames, clip_ids):
    video, text = features(frames)
    loss = ContrastiveLoss().double()
    leaves = [video, text, loss.temperature]
    ours = loss(video, text, clip_ids)
    plain = plain_contrast(video, text, loss.temperature[0], clip_ids)
    torch.testing.assert_close(ours, plain)
    grads = (torch.autograd.grad(value, leaves) for value in (ours, plain))
    for our, expected in zip(*grads, strict=True):
        torch.testing.assert_close(our, expected)


def test_the_sum_form_equals_frozen_in_time():
    video, text = features(frames=False)
    loss = ContrastiveLoss(0.05, learned=False, form="sum").double()
    ours = loss(video, text)
    torch.testing.assert_close(
        ours, plain_contrast(video, text, 0.05, form="sum"), rtol=1e-6, atol=0
    )
    # NormSoftmax: the diagonal of both log-softmaxes.
    logits = nn.functional.normalize(text, dim=1) @ nn.functional.normalize(video, dim=1).T / 0.05
    expected = -logits.log_softmax(1).diag().mean() - logits.T.log_softmax(1).diag().mean()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert not list(loss.parameters()) and not loss.state_dict()


def test_the_temperature_stays_within_its_bounds():
    video, text = features()
    loss = ContrastiveLoss().double()
    assert loss.temperature.item() == pytest.approx(0.07)
    for value, expected in ((0.9, 0.5), (1e-5, 0.001)):
        loss.temperature.data.fill_(value)
        loss(video, text).backward()
        assert loss.temperature.item() == pytest.approx(expected)
        assert loss.temperature.grad.abs() > 0  # the gradient does not vanish
    loss.eval()
    loss.temperature.data.fill_(0.9)
    loss(video, text)
    assert loss.temperature.item() == pytest.approx(0.9)  # clamped in training only


def test_contrast_in_float32_under_autocast():
    video, text = features(dtype=torch.float32)
    loss = ContrastiveLoss()
    plain = loss(video, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(video, text), plain)
        assert loss.similarity(video, text).dtype == torch.float32
        low = loss(video.bfloat16(), text.bfloat16())
    assert low.dtype == torch.float32
    assert abs(low - plain) < 0.05


def test_contrast_compiles():
    torch._dynamo.reset()
    video, text = features(dtype=torch.float32)
    loss = ContrastiveLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video, text, CLIPS), loss(video, text, CLIPS))


class Towers(nn.Module):
    """Two linear towers and the loss."""

    def __init__(self, form, gather):
        super().__init__()
        torch.manual_seed(3)
        self.video, self.text = nn.Linear(C, 4), nn.Linear(C, 4)
        self.loss = ContrastiveLoss(form=form, gather=gather)

    def forward(self, video, text, clip_ids):
        return self.loss(self.video(video), self.text(text), clip_ids)


def _batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(B, T, C, generator=generator), torch.randn(B, C, generator=generator)


def _rank(rank, folder):
    own = slice(rank * B // 2, (rank + 1) * B // 2)
    video, text = _batch()
    results = {}
    for form in ("mean", "sum"):
        for clip_ids in (None, CLIPS):
            towers = Towers(form, True)
            model = nn.parallel.DistributedDataParallel(towers)
            loss = model(video[own], text[own], None if clip_ids is None else clip_ids[own])
            loss.backward()
            results[form, clip_ids is None] = [loss.detach(), *(p.grad for p in model.parameters())]
    # Each rank scales the sum by its own values, so gradients of all ranks are involved.
    x = video[own].clone().requires_grad_()
    whole = gather_with_gradient(x)
    (whole * (rank + 1) * torch.arange(B)[:, None, None]).sum().backward()
    results["gathered"] = [whole.detach(), x.grad]
    torch.save(results, f"{folder}/{rank}.pt")


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path):
    on_two_ranks(_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    video, text = _batch()
    for form in ("mean", "sum"):
        for clip_ids in (None, CLIPS):
            towers = Towers(form, False)
            loss = towers(video, text, clip_ids)
            loss.backward()
            own = [rank[form, clip_ids is None] for rank in ranks]
            torch.testing.assert_close((own[0][0] + own[1][0]) / 2, loss.detach())
            for grads in (grads[1:] for grads in own):
                for our, parameter in zip(grads, towers.parameters(), strict=True):
                    torch.testing.assert_close(our, parameter.grad)
    for rank in range(2):
        whole, grad = ranks[rank]["gathered"]
        assert torch.equal(whole, video)
        rows = torch.arange(B)[rank * B // 2 : (rank + 1) * B // 2]
        assert torch.equal(grad, (3.0 * rows)[:, None, None].expand_as(grad))


def test_without_ranks_nothing_is_gathered():
    video, text = features()
    assert gather_with_gradient(text) is text
    loss, alone = ContrastiveLoss(gather=True).double(), ContrastiveLoss().double()
    assert torch.equal(loss(video, text, CLIPS), alone(video, text, CLIPS))


def draw(similarity, clip_ids=None, step=0):
    samples = torch.arange(len(similarity)) + 100
    return hard_negatives(5, step, samples, similarity, clip_ids)


def test_negatives_equal_a_plain_loop():
    similarity = 3 * torch.randn(B, B)
    numbers = [uniform(5, 0, torch.arange(B) + 100, B, stream=s) for s in (4 << 58, 5 << 58)]
    negatives = draw(similarity, CLIPS)
    for drawn, rows, number in zip(
        (negatives.captions, negatives.clips), (similarity, similarity.T), numbers, strict=True
    ):
        for i in range(B):
            # The minimum of exponential variables with softmax rates is a draw from the softmax.
            waits = {}
            for j, weight in enumerate(rows[i].double().softmax(0).tolist()):
                if CLIPS[i] != CLIPS[j]:
                    waits[j] = -math.log(number[i, j].item() + 2.0**-25) / weight
            assert drawn[i] == min(waits, key=waits.get)
    assert negatives.exist.all()


def test_negatives_are_drawn_in_proportion():
    draws = 1000
    similarity = torch.randn(4, 4)
    drawn = [draw(similarity, step=step) for step in range(draws)]
    for name, rows in (("captions", similarity), ("clips", similarity.T)):
        share = rows.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf).softmax(1)
        picks = torch.stack([getattr(negatives, name) for negatives in drawn])
        for i in range(4):
            counts = torch.bincount(picks[:, i], minlength=4)
            assert counts[i] == 0
            spread = (draws * share[i] * (1 - share[i])).sqrt()
            assert ((counts - draws * share[i]).abs() <= 4 * spread).all()


def test_negatives_never_match():
    similarity = torch.full((B, B), -200.0).fill_diagonal_(200.0)  # softmax is 0 elsewhere
    negatives = draw(similarity, CLIPS)
    assert (CLIPS[negatives.captions] != CLIPS).all() and (CLIPS[negatives.clips] != CLIPS).all()


def test_a_batch_of_one_clip_has_no_negatives():
    ids = torch.tensor([3, 3, 3])
    negatives = draw(torch.randn(3, 3), ids)
    assert not negatives.exist.any()
    assert negatives.captions.min() >= 0 and negatives.captions.max() < 3
    logits = torch.randn(9, 2, requires_grad=True)
    loss = matching_loss(logits, negatives)
    loss.backward()
    torch.testing.assert_close(loss, -logits[:3].log_softmax(1)[:, 1].mean())
    assert (logits.grad[3:] == 0).all()


def test_matching_loss_equals_a_plain_loop():
    negatives = Negatives(
        torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    )
    captions, clips = negatives.pairs()
    expected = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0), (2, 0), (0, 1), (1, 2)]
    assert list(zip(captions.tolist(), clips.tolist(), strict=True)) == expected
    logits = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    total = [-logits[row].log_softmax(0)[int(row < 3)] for row in range(9) if row not in (4, 7)]
    torch.testing.assert_close(matching_loss(logits, negatives), sum(total) / 7)
    assert torch.autograd.gradcheck(lambda logits: matching_loss(logits, negatives), logits)
    assert matching_loss(logits.bfloat16(), negatives).dtype == torch.float32


def test_masked_word_loss_equals_a_plain_loop():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 6, 0, -100])
    total = [-logits[i].log_softmax(0)[labels[i]] for i in (0, 2, 3)]
    torch.testing.assert_close(masked_word_loss(logits, labels), sum(total) / 3)
    assert torch.autograd.gradcheck(lambda logits: masked_word_loss(logits, labels), logits)
    nothing = masked_word_loss(logits, torch.full((5,), -100))
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()
    assert masked_word_loss(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_masked_patch_loss_equals_a_plain_loop(backend):
    video = torch.randint(0, 256, (2, 3, 2, 8, 8), dtype=torch.uint8)
    ids_mask = torch.tensor([[0, 5, 7], [1, 2, 6]])  # of 2 frames of 2 x 2 patches
    prediction = torch.randn(2, 3, 48, requires_grad=True)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    loss = MaskedPatchLoss(4, mean=mean, std=std, backend=backend)
    pixels = video / 255
    for c in range(3):
        pixels[:, c] = (pixels[:, c] - mean[c]) / std[c]
    total = 0
    for b in range(2):
        for m, patch in enumerate(ids_mask[b].tolist()):
            t, y, x = patch // 4, patch % 4 // 2, patch % 2
            target = pixels[b, :, t, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            target = target.permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total = total + (prediction[b, m] - target).square().mean()
    ours = loss(prediction, video, ids_mask)
    torch.testing.assert_close(ours, total / 6)
    grads = (torch.autograd.grad(value, prediction)[0] for value in (ours, total / 6))
    torch.testing.assert_close(*grads)
    # A floating-point clip is already normalised.
    torch.testing.assert_close(loss(prediction, pixels, ids_mask), ours)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveLoss(0.6)
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveLoss(bounds=(0.0, 0.5))
    with pytest.raises(ValueError, match="form"):
        ContrastiveLoss(form="max")
    video, text = features()
    loss = ContrastiveLoss().double()
    with pytest.raises(ValueError, match="video"):
        loss(video[..., :2], text)
    with pytest.raises(ValueError, match="a caption for each clip"):
        loss(video[:2], text)
    with pytest.raises(ValueError, match="clip_ids"):
        loss(video, text, CLIPS[:2])
    with pytest.raises(ValueError, match="similarity"):
        hard_negatives(0, 0, torch.arange(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 2"):
        draw(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="logits"):
        matching_loss(torch.zeros(4, 2), draw(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="labels"):
        masked_word_loss(torch.zeros(4, 7), torch.zeros(3, dtype=torch.int64))
